"""The command lines of runs and comparisons, without what they start: --help and the Tab key answer at once."""

import argparse


def pipeline_parser() -> argparse.ArgumentParser:
    """The options of `glmflow run` and `python -m flows.rlhf_pipeline`."""
    options = argparse.ArgumentParser(prog="glmflow run", description="Run the pipeline.")
    options.add_argument("recipe", nargs="?", help="YAML file with sections of params.yaml; -S comes after it")
    options.add_argument(
        "-S", "--set", action="append", default=[], metavar="NAME=VALUE", dest="overrides",
        help="override a name of params.yaml, such as ppo.learning_rate=2e-5; runs in a workspace of its own",
    )  # fmt: skip
    options.add_argument("--until", metavar="STEP", help="the last step, such as evaluate_sft; registers nothing")
    options.add_argument("--serve", action="store_true", help="stay, and run what is started as rlhf-pipeline/served")
    options.add_argument("--cron", help="with --serve: also start runs by this schedule, such as '0 3 * * 0' (UTC)")
    return options


def comparison_parser() -> argparse.ArgumentParser:
    """The options of `glmflow compare` and `python -m flows.compare_methods`."""
    options = argparse.ArgumentParser(
        prog="glmflow compare", description="Run variants of the parameters on the same data, in one table."
    )
    options.add_argument("recipe", nargs="?", help="YAML file with name, seeds, overrides and variants")
    options.add_argument("--methods", metavar="A,B", help="values of sft.method: lora, p_tuning, freeze, full")
    options.add_argument("--algorithms", metavar="A,B", help="values of algorithm")
    options.add_argument("--seeds", metavar="1,2,3", help="one run of each variant for each of them")
    options.add_argument(
        "-S", "--set", action="append", default=[], metavar="NAME=VALUE,VALUE", dest="settings",
        help="values of a name of params.yaml that are compared; a single one is set for all",
    )  # fmt: skip
    options.add_argument(
        "--variant", action="append", default=[], metavar="NAME:KEY=VALUE,KEY=VALUE", dest="variants",
        help="a variant of its own",
    )  # fmt: skip
    options.add_argument("--until", help="last step: evaluate_sft, or evaluate; default: as far as the variants differ")
    options.add_argument("--name", help="of the folder reports/compare/<name>")
    options.add_argument("--experiments", metavar="A,B", help="DVC experiments to tabulate, or 'all' of this commit")
    return options
