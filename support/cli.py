"""Command-line helpers of the scripts: flags, one-line errors, progress, safe file writing."""
import argparse
import contextlib
import dataclasses
import datetime
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# What write_file calls a file that is not complete yet; the * is random.
UNFINISHED = ".{name}.*.unfinished"


# ----------------------------------------------------------------------------- errors
class UserError(ValueError):
    """An error the user can fix. The message says what was got, what was expected, what to do."""


def run_script(main: Callable, argv: list[str] | None = None) -> None:
    """Runs a script's main(argv); an error the user can fix prints one line and exits with code 2.

    Models raise plain ValueErrors for bad settings, so those count too. Any other exception is a
    bug and keeps its traceback; FARMER_DEBUG=1 shows the traceback of every error.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that cannot be printed is escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        main(argv)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, RuntimeError) as error:
        bug = isinstance(error, RuntimeError) and not is_lost(error)
        if os.environ.get("FARMER_DEBUG") or bug:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        if is_lost(error):
            message = "another process has ended; see what it printed"
        elif not isinstance(error, UserError):
            message += " (FARMER_DEBUG=1 shows where)"
        print(f"{script()}: error: {message}", file=sys.stderr)
        sys.exit(2)


def script() -> str:
    """The name of the running script."""
    return Path(sys.argv[0]).name


def is_first() -> bool:
    """Whether this is the only process or the first one that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process of this run has ended."""
    words = "by peer|remote (worker|process)"  # gloo's and NCCL's
    return isinstance(error, RuntimeError) and re.search(words, str(error)) is not None


def say(message: str, file=None) -> None:
    """Prints a line in the first process only, on stdout or on `file`."""
    if is_first():
        print(message, file=file, flush=True)


def warn(message: str, everywhere: bool = False) -> None:
    """Prints a warning, in the first process only or everywhere."""
    if everywhere or is_first():
        print(f"{script()}: warning: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def reading(path: str | Path, advice: str) -> Iterator[None]:
    """Context for reading a file that somebody else wrote: any error becomes one UserError.

    Its message holds `path`, the cause and `advice`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        cause = f"{type(error).__name__}: {lines[0][:200]}"
        raise UserError(f"{path}: cannot be read ({cause}); {advice}") from error


# ----------------------------------------------------------------------------- flags
class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, no abbreviated flags, and --some_flag = --some-flag."""

    def __init__(self, **kwargs):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        arguments = sys.argv[1:] if args is None else args
        dashed = [re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), a) for a in arguments]
        return super().parse_known_args(dashed, namespace)

    def error(self, message):
        print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(2)

    def add_settings(self, title: str, defaults) -> None:
        """A group with a flag for each field of `defaults`, an instance of a dataclass.

        The type of a flag is that of the default; its help text and choices are in the field's
        metadata. A flag that is not given is None. Fields that are dataclasses get no flag. Raises
        UserError if a field has the name of a flag that the script has already.
        """
        group = self.add_argument_group(title)
        for field in dataclasses.fields(defaults):
            default = getattr(defaults, field.name)
            if dataclasses.is_dataclass(default):
                continue
            text = field.metadata.get("help", "").replace("%", "%%")
            options = dict(dest=field.name, default=None, help=f"{text} (default: {default})")
            if isinstance(default, bool):
                options["action"] = argparse.BooleanOptionalAction
            else:
                kind = type(default)
                options["type"] = kind
                options["choices"] = field.metadata.get("choices") or None
                options["metavar"] = None if options["choices"] else kind.__name__.upper()
            try:
                group.add_argument("--" + field.name.replace("_", "-"), **options)
            except argparse.ArgumentError:
                kind = type(defaults)
                raise UserError(f"{kind.__module__}.{kind.__name__}: its field {field.name} has "
                                "the name of a flag of this script; rename the field") from None


def at_least(kind: type, least: float) -> Callable:
    """A `type` for argparse: a number of this kind that is not below `least`."""

    def convert(text: str):
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"got {text}, expected at least {least}")
        return value

    convert.__name__ = kind.__name__  # argparse's error shows it if the text is not a number
    return convert


def given(args: argparse.Namespace, cls) -> dict:
    """The fields of a dataclass that the command line sets."""
    values = {field.name: getattr(args, field.name, None) for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if value is not None}


# ----------------------------------------------------------------------------- progress
class Progress:
    """Prints on stderr how far something is and how long it will take.

    It starts after a second: in a terminal one line that changes, elsewhere a line every ten
    seconds. Only the first process prints.
    """

    def __init__(self, what: str, total: int, quiet: bool = False):
        self.what = what
        self.total = total
        self.quiet = quiet or not is_first()
        self.start = time.monotonic()
        self.next = self.start + 1

    def __call__(self, done: int) -> None:
        now = time.monotonic()
        if self.quiet or now < self.next and (done < self.total or now < self.start + 1):
            return
        terminal = sys.stderr.isatty()
        self.next = now + (0.5 if terminal else 10)
        left = duration((now - self.start) / max(done, 1) * (self.total - done))
        end = "\r" if terminal and done < self.total else "\n"
        line = f"{self.what} {done}/{self.total}, {left} left"
        print(line, end=end, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """3700 -> 1:01:40, 100 -> 0:01:40."""
    return str(datetime.timedelta(seconds=int(seconds)))


# ----------------------------------------------------------------------------- files
def expanded(path: str | Path) -> Path:
    """The path with ~ as the home directory."""
    return Path(os.path.expanduser(path))


def write_file(path: str | Path, write: Callable) -> None:
    """Writes a file as a whole: write(file) fills a temporary file, which then becomes `path`.

    So there is never a half-written file. If it cannot be written, this raises UserError and an
    older file of that name stays untouched.
    """
    path = expanded(path)
    temporary = path.with_name(UNFINISHED.format(name=path.name).replace("*", os.urandom(4).hex()))
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        cause = error.strerror or error
        raise UserError(f"{path}: cannot be written ({cause}); free some space or choose another "
                        "place") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()  # if it has not become `path`


def check_writable(flag: str, path: str | Path) -> Path:
    """Checks, before the work begins, that a file can be made there -> the path, ~ expanded."""
    path = expanded(path)
    if path.is_dir():
        raise UserError(f"{flag}: got {path}, which is a folder; expected the name of a file")
    if not path.parent.is_dir():
        raise UserError(f"{flag}: {path.parent} is not a folder; create it first")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{flag}: {path.parent} cannot be written to; choose another place")
    return path


def cache_directory() -> Path:
    """The folder for downloads: $XDG_CACHE_HOME/farmer, else ~/.cache/farmer."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):
        raise UserError("there is no home folder to keep downloads in; set XDG_CACHE_HOME")
    return Path(base) / "farmer"
