"""Faults planted in CUDA sources by rule, to see whether tests find them.

    mutants = mutants_of(path)                                 # no kernel is known to this file
    trial = Trial(sources, "name", check)                      # check(library) raises where the library is wrong
    verdicts = trial.verdicts(mutants)                         # each mutant in a process of its own
    survivors = [m for m, verdict in verdicts.items() if verdict == SURVIVED]

The rules read text, as clang-format leaves it: binary operators stand between spaces, template brackets do not.
"""

from __future__ import annotations

import faulthandler
import os
import re
import select
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cuda_emulator import build

SURVIVED, UNCOMPILED = "survived", "does not compile"


@dataclass(frozen=True)
class Mutant:
    """`before`, at `offset` of `file`, becomes `after`."""

    file: Path
    line: int
    kind: str
    before: str
    after: str
    offset: int
    label: str  # names the mutant in lists of survivors, and stays when lines move

    def applied(self, text: str) -> str:
        end = self.offset + len(self.before)
        assert text[self.offset : end] == self.before, f"{self.file.name} has changed since its mutants were listed"
        return text[: self.offset] + self.after + text[end:]


# --- the rules: each yields (start, end, replacement) of the code, in which comments and directives are blanks -------

Edits = Iterator[tuple[int, int, str]]
OPENING, CLOSING = "([{", ")]}"
ZERO = r"(?:0\.?0*f?|T\(0\)|T\{\})"


def _blanked(text: str) -> str:
    """Same length, with comments, strings, preprocessor lines, constants and static assertions blanked out."""
    unread = r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*"
    constant = r"\bstatic_assert\b[^;]*;|\bconstexpr\s+(?!if)[\w:<>]+\s+\w+\s*=[^;]*;|\btemplate <[^;{]*?>(?=\s)"
    for pattern in (unread, constant):
        text = re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m[0]), text, flags=re.DOTALL | re.MULTILINE)
    for match in re.finditer(r"__launch_bounds__\(", text):  # of a kernel's speed, not of what it computes
        end = _closing(text, match.end() - 1) + 1
        text = text[: match.start()] + re.sub(r"[^\n]", " ", text[match.start() : end]) + text[end:]
    return text


def _closing(code: str, start: int) -> int:
    """The bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(code)):
        depth += (code[i] in OPENING) - (code[i] in CLOSING)
        if depth == 0:
            return i
    return len(code)


def _expression_start(code: str, end: int, stops: str) -> int:
    """Where the expression that ends at `end` begins: after an open bracket, the end of a statement or a stop."""
    depth = 0
    for i in range(end - 1, -1, -1):
        if depth == 0 and (code[i] in OPENING + ";}" or re.search(rf"(?:{stops})$", code[max(0, i - 7) : i + 1])):
            return i + 1
        depth += (code[i] in CLOSING) - (code[i] in OPENING)
    return 0


def _expression_end(code: str, start: int, stops: str) -> int:
    depth = 0
    for i in range(start, len(code)):
        if depth == 0 and (code[i] in CLOSING + ";{" or re.match(stops, code[i:])):
            return i
        depth += (code[i] in OPENING) - (code[i] in CLOSING)
    return len(code)


def _trimmed(code: str, start: int, end: int) -> tuple[int, int]:
    text = code[start:end]
    return start + len(text) - len(text.lstrip()), end - (len(text) - len(text.rstrip()))


def _loop_headers(code: str) -> list[tuple[int, int]]:
    starts = [match.end() - 1 for match in re.finditer(r"\b(?:for|while) \(", code)]
    return [(start, _closing(code, start)) for start in starts]


def _removed(pattern: str) -> Callable[[str], Edits]:
    def rule(code: str) -> Edits:
        for match in re.finditer(pattern, code):
            yield match.start(), _closing(code, match.end() - 1) + 1, "(void)0"

    return rule


def _bounds(code: str) -> Edits:
    for match in re.finditer(r" (<|>) ", code):
        if re.match(rf"{ZERO} \? {ZERO} :", code[match.end() :]):
            continue  # relu of zero is zero either way
        yield match.start(1), match.end(1), match[1] + "="
    for match in re.finditer(r" (<|>)= ", code):
        yield match.start(1), match.end(1) + 1, match[1]


# After these an operand of ?: begins; && ends one, too.
OPERAND = r"\breturn\s|[,?:]\s|[^=!<>]=\s"


def _conditions(code: str) -> Edits:
    for match in re.finditer(r"\bif \(", code):
        start, end = match.end(), _closing(code, match.end() - 1)
        leaves = re.match(r"\)\s*(?:\{\s*)?(?:return|continue|break)\b", code[end:])
        yield start, end, "false" if leaves else "true"
    for match in re.finditer(r"\s\? ", code):
        start = _expression_start(code, match.start(), OPERAND)
        yield *_trimmed(code, start, match.start()), "true"
    for match in re.finditer(r"\bbool \w+ = ", code):
        yield match.end(), code.index(";", match.end()), "true"
    for match in re.finditer(r" &&\s", code):
        start = _expression_start(code, match.start(), OPERAND + r"|\|\|\s|&&\s")
        yield *_trimmed(code, start, match.start()), "true"
        end = _expression_end(code, match.end(), r"\s\|\||\s&&|,|\s[?:]\s")
        yield *_trimmed(code, match.end(), end), "true"


def _copy_masks(code: str) -> Edits:
    for match in re.finditer(r"\bcp_async_(?:16|8|4)\(", code):
        end = _closing(code, match.end() - 1)
        start, end = _trimmed(code, _expression_start(code, end, r",\s"), end)
        if code[start:end] != "true":
            yield start, end, "true"


def _strides(code: str) -> Edits:
    names = sorted(set(re.findall(r"\b\w*stride_\w+\b", code)))
    for match in re.finditer(r"\b(\w*stride_(?:\w+_)?)([a-z0-9]+)\b", code):
        statement = code[_expression_start(code, match.start(), ";") : match.start()]
        declared = re.match(r"\s*(?:const )?(?:u?int\d*_t|int|long|size_t) [\w, ]*$", statement)
        initialised = re.search(r"[,:]\s*$", code[: match.start()]) and code[match.end()] == "("
        siblings = [name for name in names if re.fullmatch(match[1] + r"[^_]+", name)]
        if match[0] in siblings and len(siblings) > 1 and not declared and not initialised:
            yield match.start(), match.end(), siblings[(siblings.index(match[0]) + 1) % len(siblings)]


def _relus(code: str) -> Edits:
    for match in re.finditer(rf"(\b[\w.\[\]]+) < {ZERO} \? {ZERO} : \1(?![\w.\[])", code):
        yield match.start(), match.end(), f"fmaxf({match[1]}, 0.0f)"


def _fragments(code: str) -> Edits:
    for match in re.finditer(r"\b(\w+)\[([0-3])\]", code):
        statement = code[_expression_start(code, match.start(), ";") : match.start()]
        if (
            re.match(r"\s*(?:(?:const|static|typename) )*[\w:<>]+\s[\w\[\],\s]*$", statement)
            and "return" not in statement
        ):
            continue  # a declaration
        for index in {"0": "1", "1": "02", "2": "13", "3": "2"}[match[2]]:
            if f"{match[1]}[{index}]" in code:
                yield match.start(2), match.end(2), index


def _shuffle_distances(code: str) -> Edits:
    for match in re.finditer(r"\b__shfl_(?:xor|down|up)_sync\(", code):
        first = _expression_end(code, match.end(), ",") + 1
        start = _expression_end(code, first, ",") + 1
        start, end = _trimmed(code, start, _expression_end(code, start, ","))
        yield start, end, f"({code[start:end]}) / 2"


def _initialisations(code: str) -> Edits:
    """Any other value stands for the one that would be there by chance."""
    for match in re.finditer(r"\bfloat \w+(?:\[[^\]]*\])*(?: = )?(\{\}|\{0[^}]*\})", code):
        yield match.start(1), match.end(1), "{1234.5f}"
    for match in re.finditer(r" = (0\.0*f)(?=[;,])", code):
        yield match.start(1), match.end(1), "1234.5f"


def _sums(code: str) -> Edits:
    loops = _loop_headers(code)
    for match in re.finditer(r" (\+=) ", code):
        if not any(start < match.start() < end for start, end in loops):
            yield match.start(1), match.end(1), "="


def _epsilons(code: str) -> Edits:
    for match in re.finditer(r" \+ (?:[\w.]*\beps\b|\w+_eps\b|eps_\w+|\d\.?\d*e-\d+f?)", code):
        yield match.start(), match.end(), ""


def _replaced(pattern: str, replacement: str) -> Callable[[str], Edits]:
    def rule(code: str) -> Edits:
        for match in re.finditer(pattern, code):
            yield match.start(), match.end(), replacement

    return rule


RULES: dict[str, Callable[[str], Edits]] = {
    "barrier removed": _removed(r"\b__sync(?:threads|warp)\("),
    "wait removed": _removed(r"\b(?:\w+::)*cp_async_wait<\w+>\("),
    "commit removed": _removed(r"\b(?:\w+::)*cp_async_commit\("),
    "bound off by one": _bounds,
    "condition dropped": _conditions,
    "mask of a copy dropped": _copy_masks,
    "stride of another axis": _strides,
    "relu drops NaN": _relus,
    "fragment of another index": _fragments,
    "index narrowed": _replaced(r"\bint64_t\b", "int32_t"),
    "shuffle distance halved": _shuffle_distances,
    "initialisation dropped": _initialisations,
    "sum overwritten": _sums,
    "eps dropped": _epsilons,
}


def mutants_of(path: Path) -> list[Mutant]:
    """All mutants of a source, in the order of RULES; what two rules give alike is listed once."""
    text = path.read_text()
    code = _blanked(text)
    lines = text.splitlines()
    found: dict[tuple[int, int, str], Mutant] = {}
    labels = Counter[str]()
    for kind, rule in RULES.items():
        for start, end, after in rule(code):
            before, line = text[start:end], text.count("\n", 0, start) + 1
            if before == after or (start, end, after) in found:
                continue
            change = f"{' '.join(before.split())} -> {after}" if after else f"without{before}"
            label = f"{path.name}: {kind}: {lines[line - 1].strip()} [{change}]"
            labels[label] += 1
            label += f" #{labels[label]}" if labels[label] > 1 else ""
            found[start, end, after] = Mutant(path, line, kind, before, after, start, label)
    return list(found.values())


# --- trials ---------------------------------------------------------------------------------------------------------


def mutated_library(
    mutant: Mutant,
    sources: Sequence[Path],
    name: str,
    scratch: Path,
    *,
    flags: Sequence[str] = (),
    includes: Sequence[Path] = (),
    torch: bool = False,
) -> Path:
    """`build.library` of these sources with the mutant in its file. What is new is made in the folder `scratch`.

    The folder of the mutant's file is copied, and what lies beside the folder linked, so that every include finds the
    mutant; sources in that folder are those of the copy.
    """
    folder = mutant.file.resolve().parent
    copy = scratch / "sources" / folder.name
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / mutant.file.name).write_text(mutant.applied(mutant.file.read_text()))
    for neighbour in folder.parent.iterdir():
        if neighbour != folder:
            (copy.parent / neighbour.name).symlink_to(neighbour)
    moved = [copy / source.name if source.resolve().parent == folder else source for source in sources]
    kept = [include for include in includes if include.resolve() != folder]
    return build.library(moved, name, flags, [copy, *kept], torch=torch, scratch=scratch)


@dataclass
class Trial:
    """How mutants are compiled, as `build.library`, and checked: `check(path of the library)` raises if it is wrong."""

    sources: Sequence[Path]
    name: str
    check: Callable[[Path], None]
    flags: Sequence[str] = ()
    includes: Sequence[Path] = ()
    torch: bool = False
    seconds: int = 30  # for the check; longer is a verdict, too
    jobs: int = field(default_factory=lambda: int(os.environ.get("MAX_JOBS", "2")))

    def verdicts(self, mutants: Sequence[Mutant]) -> dict[Mutant, str]:
        """SURVIVED, UNCOMPILED, or how the check failed: its exception, a signal, no end.

        Raises AssertionError unless the sources themselves pass the check, in a process as the mutants' are.
        """
        with tempfile.TemporaryDirectory() as scratch:
            (verdict,) = self._collected([None], Path(scratch))
            assert verdict == SURVIVED, f"the check fails without a mutant: {verdict}"
            found = dict(zip(mutants, self._collected(mutants, Path(scratch)), strict=True))
            assert all(found.values()), "a process ended without a verdict"
            return found

    def _collected(self, mutants: Sequence[Mutant | None], scratch: Path) -> list[str]:
        """Forks, as a mutant may end its process. torch must have started no threads: see torch.set_num_threads."""
        words = [""] * len(mutants)
        waiting, running = list(range(len(mutants))), dict[int, tuple[int, int]]()
        while waiting or running:
            while waiting and len(running) < max(1, self.jobs):
                number = waiting.pop(0)
                reader, process = self._forked(mutants[number], scratch / str(number))
                running[reader] = (number, process)
            for reader in select.select(list(running), [], [])[0]:
                number, process = running.pop(reader)
                with os.fdopen(reader) as pipe:
                    words[number] = pipe.read()
                status = os.waitpid(process, 0)[1]
                if os.WIFSIGNALED(status):
                    end = signal.Signals(os.WTERMSIG(status))
                    words[number] = "no end" if end == signal.SIGALRM else end.name
        return words

    def _forked(self, mutant: Mutant | None, scratch: Path) -> tuple[int, int]:
        """The end of a pipe, into which a child writes its verdict, and the child."""
        reader, writer = os.pipe()
        if process := os.fork():
            os.close(writer)
            return reader, process
        try:
            os.close(reader)
            faulthandler.disable()  # the signal is word enough
            os.write(writer, self._verdict(mutant, scratch).encode()[:4000])
        finally:
            os._exit(0)

    def _verdict(self, mutant: Mutant | None, scratch: Path) -> str:
        options: dict[str, Any] = {"flags": self.flags, "includes": self.includes, "torch": self.torch}
        try:
            if mutant is None:
                library = build.library(self.sources, self.name, **options)
            else:
                library = mutated_library(mutant, self.sources, self.name, scratch, **options)
        except RuntimeError as error:
            return f"{UNCOMPILED}: {error}" if mutant is None else UNCOMPILED
        signal.alarm(self.seconds)
        try:
            self.check(library)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            signal.alarm(0)
            shutil.rmtree(scratch, ignore_errors=True)
        return SURVIVED
