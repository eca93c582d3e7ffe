"""``monai-morse`` or ``python -m monai_morse``: the demo, bundles, phantoms, data sets, sweeps and their tables."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import monai
import torch

from monai_morse import __version__
from monai_morse.bundles import bundle_names, copy_bundle
from monai_morse.errors import ending, say_how_to_go_on


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(prog="monai-morse", description=__doc__)
    versions = f"monai_morse {__version__}, MONAI {monai.__version__}, torch {torch.__version__}"
    versions += f", Python {platform.python_version()}"
    parser.add_argument("--version", action="version", version=versions)
    commands = parser.add_subparsers(dest="command", required=True)
    formatter = argparse.ArgumentDefaultsHelpFormatter

    demo = commands.add_parser("demo", help="train bare and as MORSE, segment, score, draw", formatter_class=formatter)
    demo.add_argument("--out", type=Path, default=Path("demo"), help="folder for data, runs, table and picture")
    demo.add_argument("--data", type=Path, help="a data set in the MSD layout; default: the phantom, written first")
    demo.add_argument("--epochs", type=int, help="epochs of each training; default: sized for ten minutes on two cores")

    bundle = commands.add_parser("bundle", help="copy a bundle that travels with the package", formatter_class=formatter)
    bundle.add_argument("name", help=f"one of {', '.join(bundle_names())}")
    bundle.add_argument("--out", type=Path, default=Path("."), help="folder to copy it to")

    phantom = commands.add_parser("phantom", help="write a synthetic abdominal data set", formatter_class=formatter)
    phantom.add_argument("--out", required=True, help="folder to write, in the MSD layout (mri) or in BTCV's (ct)")
    phantom.add_argument("--modality", choices=["mri", "ct"], default="mri", help="mri: three phases a patient; ct: one scan")
    phantom.add_argument("--patients", type=int, default=20)
    phantom.add_argument("--seed", type=int, default=0)
    phantom.add_argument("--spacing", type=float, nargs=3, default=[2.5, 2.5, 5.0], metavar="MM", help="voxel size")

    prepare = commands.add_parser("prepare", help="write a data set in the MSD layout from what groups have")
    sources = prepare.add_subparsers(dest="kind", required=True)
    mpmri = sources.add_parser("mpmri", help="multi-phasic liver MRI, NIfTI or DICOM", formatter_class=formatter)
    mpmri.add_argument("--source", required=True, help="folder with the patients' scans and liver masks")
    mpmri.add_argument("--out", required=True, help="folder to write")
    mpmri.add_argument("--pattern", help="where scans are: '{patient}/*{phase}*'; default: the usual layouts are tried")
    mpmri.add_argument("--label_pattern", help="where masks are: '{patient}/mask'; default: the usual layouts are tried")
    mpmri.add_argument("--phases", default="separate", help="separate: a case a phase; channels: all as channels of one case")
    mpmri.add_argument(
        "--label_values", nargs="+", help="of the liver, 5, or of several: liver=5 kidneys=2,3; default: the only one"
    )
    more = "more words for phases, or more phases: ph1=pre del=delayed"
    mpmri.add_argument("--phase_words", nargs="+", default=[], metavar="WORD=PHASE", help=more)
    chaos = sources.add_parser("chaos", help="CHAOS as downloaded: MRI, 4 organs; CT, liver", formatter_class=formatter)
    chaos.add_argument("--source", required=True, help="folder that CHAOS_Train_Sets was unpacked to")
    chaos.add_argument("--out", required=True, help="folder to write")
    chaos.add_argument("--modality", nargs="+", default=["t2spir"], help="of t2spir, t1in, t1out and ct, or all")
    chaos.add_argument("--organs", nargs="+", help="of liver, right_kidney, left_kidney, spleen; default: all that are masked")
    chaos.add_argument("--phases", default="separate", help="separate, or channels: t1in and t1out as channels of one case")
    hcc = sources.add_parser("liverhccseg", help="LiverHccSeg as downloaded: MRI in four phases", formatter_class=formatter)
    hcc.add_argument("--source", required=True, help="folder that nifti_and_segms was unpacked to")
    hcc.add_argument("--out", required=True, help="folder to write")
    hcc.add_argument("--phases", default="separate", help="separate: a case a phase; channels: four channels of one case")
    hcc.add_argument("--rater", type=int, default=1, help="whose masks, 1 or 2")
    hcc.add_argument("--tumor", action="store_true", help="tumors as a class of their own, not as liver")
    synapse = sources.add_parser("synapse", help="BTCV's RawData, or what TransUNet's authors made", formatter_class=formatter)
    synapse.add_argument("--source", required=True, help="folder with img and label, or train_npz and test_vol_h5, or above it")
    synapse.add_argument("--out", required=True, help="folder to write")

    wrap = commands.add_parser("wrap", help="turn a MONAI segmentation bundle into a MORSE bundle", formatter_class=formatter)
    wrap.add_argument("--bundle", required=True, help="folder or zip archive; its code is run to build its network")
    wrap.add_argument("--out", required=True, help="folder to write")
    wrap.add_argument("--decoder", nargs="*", help="submodules that make the decoder features; default: found for MONAI's")

    sweep = commands.add_parser("sweep", help="train and evaluate every cell of a grid of options", formatter_class=formatter)
    sweep.add_argument("--bundle", type=Path, required=True, help="folder of a bundle with train.yaml and evaluate.yaml")
    sweep.add_argument("--grid", required=True, help="e.g. 'experts=[none,stochastic] renderer=[none,anatomical] fold=[0,1]'")
    sweep.add_argument("--out", type=Path, required=True, help="folder for a folder a run")
    sweep.add_argument("--set", default="", help="what all runs share, e.g. 'iterations=200 dataset_dir=/data/liver'")
    sweep.add_argument("--over", nargs="*", default=[], help="files in configs that lie over train.yaml, e.g. slices.yaml")
    sweep.add_argument("--cpus", type=int, default=1, help="of a run")
    sweep.add_argument("--gpus", type=float, default=0, help="of a run; 0 hides them, 0.5 is a half")
    sweep.add_argument("--address", help="of a Ray cluster, or auto; default: this machine")
    sweep.add_argument("--dry_run", action="store_true", help="print the commands and run nothing")

    report = commands.add_parser("report", help="the paper's tables from the runs of a sweep", formatter_class=formatter)
    report.add_argument("runs", type=Path, help="folder with runs at any depth, or a table of them, NAME.csv.gz")
    report.add_argument("--out", type=Path, help="folder for report.md, .csv, .tex and .png; default: RUNS, of a table NAME")
    report.add_argument("--metric", default="paper", choices=["paper", "monai"], help="whose definition of the figures")
    against = "what differences are to: Baseline, IAR or another of the paper's systems, or a row by its name in the table"
    report.add_argument("--against", default="Baseline", help=against)
    report.add_argument(
        "--save", type=Path, metavar="NAME.csv.gz", help="make one table of the runs, to keep and to read again"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = build_parser().parse_args(arguments)
    say_how_to_go_on("the same command starts again")
    try:
        if args.command == "demo":
            from monai_morse.demo import run_demo

            run_demo(args.out, args.data, args.epochs)
        elif args.command == "bundle":
            print(copy_bundle(args.name, args.out))
        elif args.command == "phantom":
            from monai_morse.prepare import write_ct_phantom, write_phantom

            write = write_ct_phantom if args.modality == "ct" else write_phantom
            write(args.out, args.patients, args.seed, tuple(args.spacing))
        elif args.command == "prepare" and args.kind == "synapse":
            from monai_morse.prepare import prepare_synapse

            print(prepare_synapse(args.source, args.out))
        elif args.command == "prepare" and args.kind == "mpmri":
            from monai_morse.prepare import prepare_mpmri

            words = dict(word.split("=", 1) if "=" in word else (word, "") for word in args.phase_words)
            print(prepare_mpmri(args.source, args.out, args.pattern, args.label_pattern, args.phases, args.label_values, words))
        elif args.command == "prepare" and args.kind == "chaos":
            from monai_morse.prepare import prepare_chaos

            print(prepare_chaos(args.source, args.out, args.modality, args.organs, args.phases))
        elif args.command == "prepare" and args.kind == "liverhccseg":
            from monai_morse.prepare import prepare_liverhccseg

            print(prepare_liverhccseg(args.source, args.out, args.phases, args.rater, args.tumor))
        elif args.command == "wrap":
            from monai_morse.wrap import wrap_bundle

            print(wrap_bundle(args.bundle, args.out, args.decoder))
        elif args.command == "sweep":
            from monai_morse.experiments.sweep import sweep as run_sweep

            shared = args.set, args.cpus, args.gpus, args.address, args.dry_run, args.over
            return run_sweep(args.bundle, args.grid, args.out, *shared)
        else:
            from monai_morse.experiments.report import report as make_report

            print(make_report(args.runs, args.out, args.metric, args.against, args.save))
    except (Exception, KeyboardInterrupt) as error:
        line = ending(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
