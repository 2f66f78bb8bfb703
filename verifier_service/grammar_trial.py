"""A process that tries grammars, for `grammar_gate`: what it cannot finish dies with it.

Lines of JSON over standard input and output. First comes the model: `{"vocabulary_size": n,
"eos_ids": [...], "tokenizer_bytes": n or null}` and so many bytes of tokenizer.json; the answer
`{}` says that its trie is built. Then each line is a grammar, `{"kind": ..., "source": ...}`; the
answer is `{}`, or `{"field": ..., "message": ...}` if the grammar was refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from typing import Any, BinaryIO, Final

from outrider.domain import Grammar, GrammarKind
from outrider.errors import InvalidRequest
from outrider.processes import die_with_parent
from verifier_service.grammar import GrammarCompiler

_NICENESS: Final = 5
"""Beside a model on the same cores, the model goes first; a trial still gets its share."""


def main(parent_pid: int, trial_s: float) -> None:
    """Answer until standard input ends. A trial that takes longer than `trial_s` is the last.

    The parent is expected to end such a process itself, and earlier.
    """
    die_with_parent(parent_pid)
    os.nice(_NICENESS)
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # Nothing that a library prints may pass for an answer.
    os.dup2(2, 1)
    compiler = _compiler(requests)
    # Builds the trie. If the model cannot follow grammars, the answer to each will say so.
    _tried(compiler, {"kind": GrammarKind.REGEX.value, "source": "a"})
    _answer(answers, {})
    for line in requests:
        # The default action of the signal ends the process, although Python's thread is busy in
        # the library and no handler could run.
        signal.setitimer(signal.ITIMER_REAL, trial_s)
        answer = _tried(compiler, json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _answer(answers, answer)


def _compiler(requests: BinaryIO) -> GrammarCompiler:
    setup = json.loads(requests.readline())
    files = {}
    if setup["tokenizer_bytes"] is not None:
        files["tokenizer.json"] = requests.read(setup["tokenizer_bytes"])
    return GrammarCompiler(files, setup["vocabulary_size"], setup["eos_ids"])


def _tried(compiler: GrammarCompiler, request: dict[str, Any]) -> dict[str, str]:
    try:
        compiler.compile(Grammar(GrammarKind(request["kind"]), request["source"]))
    except InvalidRequest as error:
        return {"field": error.field, "message": error.message}
    return {}


def _answer(answers: BinaryIO, answer: dict[str, str]) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    # The parent has gone, or has closed the pipe.
    with contextlib.suppress(BrokenPipeError):
        main(int(sys.argv[1]), float(sys.argv[2]))
