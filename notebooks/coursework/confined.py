"""Grade one submission in a process that can do little: ``python confined.py FD``.

`grade` starts this program, tells it by standard input what to grade, and reads one
line of JSON from the file descriptor FD, which the submission's kernel does not get.

Before a line of the submission runs, the process gives up, for itself and for all that
it starts: memory beyond a limit; every file but Python's and the system's own programs,
which it may read, and its working folder; signals to processes that it did not start.
Hidden tests never lie in a file. They are cells, put in where they have to run.
"""

import contextlib
import ctypes
import json
import os
import re
import resource
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

CHECK = re.compile(r"""(?m)^([ \t]*)grader\.check\(\s*["'](\w+)["']\s*\).*$""")
LOUD = 10_000_000  # characters of output that are worth a word to the teacher

# What Python, torch and Jupyter read beside their own files. Not all of /proc: root may
# read other processes' environment there, and anybody their command lines.
SYSTEM = (
    "/bin", "/lib", "/lib64", "/usr", "/proc/cpuinfo", "/proc/meminfo",
    "/proc/stat", "/proc/version", "/sys/devices/system", "/dev/urandom",
    "/etc/ld.so.cache", "/etc/localtime", "/etc/passwd", "/etc/hosts", "/etc/fonts",
    "/etc/nsswitch.conf", "/etc/os-release", "/etc/mime.types",
)  # fmt: skip

# What the kernel runs first. Confinement denies the terminals in which IPython runs
# shell commands (`!ls`, `%pip`), and would end their cell: they run without one.
#
# Then the seconds of computing that a cell may take, so that an endless loop loses its
# own question only, on a busy machine too; the tests that go into the same loop after
# that get 5 each. A loop in C, one that catches everything, and one that only waits
# meet the limit of the whole sheet.
PRELUDE = """
get_ipython().system = get_ipython().system_raw
import signal as _signal
def _late(number, frame):
    raise TimeoutError("this cell took more than {seconds:.0f} s")
_signal.signal(_signal.SIGPROF, _late)
_start = lambda *_: _signal.setitimer(_signal.ITIMER_PROF, {seconds}, 5)
_stop = lambda *_: _signal.setitimer(_signal.ITIMER_PROF, 0)
get_ipython().events.register("pre_run_cell", _start)
get_ipython().events.register("post_run_cell", _stop)
"""

TEST = """
from otter.execute import Checker as _Checker
from otter.test_files.exception_test import ExceptionTestFile as _Test
_Checker.get_results().append(_Test.from_string({source!r}, path={path!r}))
_Checker.get_results()[-1].run(globals())
"""


class Checks:
    """An otter plugin that puts the tests into a notebook about to be run."""

    def __init__(self, tests: dict[str, str], seconds: float) -> None:
        """Take the tests' sources by question, and what a cell may take."""
        self.tests, self.seconds = tests, seconds
        self.questions: list[str | None] = []  # of which each cell is the test

    def before_execution(self, notebook: NotebookNode) -> NotebookNode:
        """Test a question where the student checks it; one not checked, at the end."""
        cells = [(None, PRELUDE.format(seconds=self.seconds))]
        waiting = dict(self.tests)
        for cell in notebook.cells:
            if cell.cell_type != "code":
                continue
            cells.append((None, CHECK.sub(r"\1pass", cell.source)))
            for _, name in CHECK.findall(cell.source):
                if name in waiting:
                    cells.append((name, test_cell(name, waiting.pop(name))))
        cells += [(name, test_cell(name, source)) for name, source in waiting.items()]
        self.questions = [name for name, _ in cells]
        notebook.cells = [nbformat.v4.new_code_cell(source) for _, source in cells]
        return notebook

    def run(self, event: str, *args: object) -> None:
        """Do nothing at otter's other events."""


def test_cell(name: str, source: str) -> str:
    """A cell that runs the tests of a question and notes what came of them."""
    return TEST.format(source=source, path=f"{name}.py")


def grade(sheet: str, tests: dict[str, str], seconds: float) -> dict:
    """Run a submission and its tests.

    Args:
        sheet: its name; the notebook lies here as SHEET.ipynb.
        tests: sources by question.
        seconds: that a cell may take.

    Returns:
        "message", what there is to say of the whole; "questions", which is empty if
        nothing could be graded: points and message of each.
    """
    import otter.execute

    # otter's log server would unpickle, here, what any program on this machine sends.
    otter.execute.start_server = lambda: (("127.0.0.1", 0), lambda: None)
    path = f"{sheet}.ipynb"
    try:
        notebook = nbformat.read(path, as_version=4)
    except Exception as error:
        return failure(f"not a notebook: {first_line(error)}")
    own = notebook.metadata.get("otter", {}).get("assignment_name", sheet)
    if own != sheet:
        return failure(f"a copy of the sheet {own}, not of {sheet}")
    checks = Checks(tests, seconds)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            results = otter.execute.grade_notebook(
                path, test_dir=".", plugin_collection=checks
            )
    except Exception as error:
        return failure(f"{type(error).__name__}: {first_line(error)}")
    return report(results, checks)


def failure(message: str) -> dict:
    """What is reported if nothing could be graded."""
    return {"message": message, "questions": {}}


def report(results: object, checks: Checks) -> dict:
    """Points and messages of otter's results."""
    if results.catastrophic_error:
        return failure("the notebook ended before its tests did")
    # otter puts a cell before ours, and one behind.
    executed = results.notebook.cells[1:-1]
    messages, printed, carried, own = {}, 0, [], []
    for name, cell in zip(checks.questions, executed, strict=True):
        for output in cell.outputs:
            if output.output_type == "error" and name is None:
                own.append(f"{output.ename}: {first_line(output.evalue)}")
            printed += len(output.get("text", ""))
        if name is None:
            continue
        # What a question survives may be the cause of a later loss: the first error
        # is carried on until a question fails.
        errors, own = [*carried, *own[:1]], []
        why = why_failed(results, name)
        messages[name] = "; ".join([*errors, why]) if why else ""
        carried = [] if why else errors[:1]
    found = {
        name: [results.get_score(name) if name in results.results else 0, message]
        for name, message in messages.items()
    }
    notes = [f"printed {printed / 1e6:.0f} MB"] if printed > LOUD else []
    notes += [f"after the last question: {error}" for error in own[:1]]
    return {"message": "; ".join(notes), "questions": found}


def why_failed(results: object, name: str) -> str:
    """What the first failed test that has something to say says; "" if none failed."""
    if name not in results.results:
        return "was not reached"
    cases = results.get_result(name).test_case_results
    failed = [reason(case) for case in cases if not case.passed]
    return next(filter(None, failed), "AssertionError") if failed else ""


def reason(case: object) -> str:
    """A failed test's hint, or the last line of its message; "" if that is bare."""
    why = case.test_case.failure_message or case.message.strip().splitlines()[-1]
    return why.removeprefix("AssertionError:").strip()


def first_line(error: object) -> str:
    """The first line of a message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def confine(folder: Path, readable: list[str]) -> None:
    """Give up all files but these, and signals to other processes; Linux only.

    Args:
        folder: all in it may be changed.
        readable: files and folders that may be read.

    Raises:
        OSError: if this machine cannot do it.
    """
    from landlock import FSAccess, Ruleset

    look = FSAccess.READ_FILE | FSAccess.READ_DIR | FSAccess.EXECUTE
    rules = Ruleset()
    for path in filter(os.path.exists, (*SYSTEM, *readable)):
        rules.allow(path, rules=look if os.path.isdir(path) else FSAccess.READ_FILE)
    rules.allow("/dev/null", rules=FSAccess.READ_FILE | FSAccess.WRITE_FILE)
    rules.allow(str(folder))
    rules.apply()
    keep_signals_inside()


def keep_signals_inside() -> None:
    """No signal to a process outside: Landlock's ABI 6, which `landlock` lacks."""
    libc = ctypes.CDLL(None, use_errno=True)
    # struct landlock_ruleset_attr: files, network, scopes (abstract sockets, signals).
    attributes = (ctypes.c_uint64 * 3)(0, 0, 0b11)
    ruleset = libc.syscall(444, attributes, ctypes.sizeof(attributes), 0)
    if ruleset < 0 or libc.syscall(446, ruleset, 0) < 0:
        raise OSError(ctypes.get_errno(), "this kernel cannot keep signals inside")


def main() -> None:
    """Read a task, confine, grade, report."""
    answer = int(sys.argv[1])
    os.set_inheritable(answer, False)
    task = json.load(sys.stdin)
    for kind, limit in (
        (resource.RLIMIT_DATA, task["memory"]),
        (resource.RLIMIT_FSIZE, 1 << 28),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))
    if task["confined"]:
        confine(Path.cwd(), task["readable"])
    done = grade(task["sheet"], task["tests"], task["cell_seconds"])
    with os.fdopen(answer, "w") as line:
        json.dump(done, line)


if __name__ == "__main__":
    main()
