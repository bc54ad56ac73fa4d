"""A run as a command: from words to a run, and from errors to exit codes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from ecoformer.config import Config, parse_config
from ecoformer.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    InputError,
    NonFiniteError,
    Preempted,
    is_main_process,
    print_error,
    print_records,
)
from ecoformer.models.registry import ModelFamily
from ecoformer.threads import limit_spinning


def run_command(argv: Sequence[str] | None = None, family: ModelFamily | None = None) -> int:
    """Train, evaluate or time a model, as a command line (``sys.argv`` if not given) says.

    Returns:
        The process's exit code: 0 done, 1 another rank failed and says why, 2 bad input,
        3 non-finite, 75 preempted and saved, 130 interrupted.
    """
    try:
        with print_records(lambda _: is_main_process()):
            config = parse_config(argv, family)
        # Before PyTorch is imported.
        limit_spinning()
        # PyTorch and timm take seconds: whoever mistyped a flag need not wait for them.
        import_module("ecoformer.engine.run")
    except InputError as error:
        if is_main_process():
            print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        if is_main_process():
            print_error("interrupted before the run began.")
        return EXIT_INTERRUPTED
    return _run(config, family)


def _run(config: Config, family: ModelFamily | None) -> int:
    from ecoformer.engine.launch import (
        NoMeetingError,
        claim_error,
        has_failed_elsewhere,
        is_lost_rank,
        is_out_of_memory,
    )
    from ecoformer.engine.logs import print_log
    from ecoformer.engine.run import evaluate, time_model, train

    action = time_model if config.run.throughput else evaluate if config.run.eval else train
    try:
        with print_log():
            action(config, family=family)
    except (InputError, NonFiniteError, Preempted) as error:
        if claim_error():
            print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        if claim_error():
            print_error("interrupted; what was saved is untouched.")
        return EXIT_INTERRUPTED
    except (MemoryError, OverflowError) as error:
        return _tell_memory(error)
    except NoMeetingError as error:
        print_error(error)
        return EXIT_FAILED
    except RuntimeError as error:
        if is_out_of_memory(error):
            return _tell_memory(error)
        if is_lost_rank(error):
            if not has_failed_elsewhere() and claim_error():
                print_error(
                    "another rank ended, or did not answer in time (--dist-timeout "
                    f"{config.run.dist_timeout:g}); the last checkpoint is untouched. {error}"
                )
        elif not has_failed_elsewhere():
            raise
        return EXIT_FAILED
    return EXIT_DONE


def _tell_memory(error: Exception) -> int:
    from ecoformer.engine.launch import claim_error

    if claim_error():
        [reason, *_] = str(error).splitlines() or [type(error).__name__]
        print_error(
            f"out of memory, or a number that is too large ({reason}); what was saved is "
            "untouched. Lower --batch-size, --input-size or what else is large."
        )
    return EXIT_BAD_INPUT
