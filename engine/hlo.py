"""What a compiled program says of itself: where its devices talk to each other, read from its text.

XLA's text has one instruction a line: a name, the result's shape, the operation, its operands, and as `op_name` the path of scopes in which
it was traced. Nothing else of it is looked at.
"""

import re
from dataclasses import dataclass
from math import ceil, prod

_KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast|ragged-all-to-all"
_COLLECTIVE = re.compile(rf"^\s*(?:ROOT )?\S+ = (?P<shape>.+?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_ARRAY = re.compile(r"\b(?P<type>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<sizes>[\d,]*)\]")
_OP_NAME = re.compile(r'op_name="(?P<path>[^"]*)"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One instruction by which devices exchange data. Of an asynchronous pair only the beginning counts."""

    kind: str  # "all-reduce", "all-gather"
    num_bytes: int  # of its result, on one device
    scopes: tuple[str, ...]  # outermost first; empty where the compiler has made it itself

    @property
    def is_in_loop(self) -> bool:
        """Whether it may run several times, or never."""
        return "while" in self.scopes


def collectives(text: str) -> list[Collective]:
    """Every collective instruction of a program in XLA's text form, in the order in which they stand there."""
    return [found for line in text.splitlines() if (found := _collective(line)) is not None]


def _collective(line: str) -> Collective | None:
    match = _COLLECTIVE.match(line)
    if match is None:
        return None
    arrays = [_num_bytes(array) for array in _ARRAY.finditer(match["shape"])]
    if match["start"] and match["kind"] != "all-reduce":  # operands and results
        arrays = arrays[len(arrays) // 2 :] if match["kind"] == "all-gather" else arrays[1:2]
    name = _OP_NAME.search(line)
    return Collective(kind=match["kind"], num_bytes=sum(arrays), scopes=tuple(name["path"].split("/")) if name else ())


def _num_bytes(array: re.Match[str]) -> int:
    bits = 8 if array["type"] == "pred" else int(array["bits"])
    return ceil(prod(int(size) for size in array["sizes"].split(",") if size) * bits / 8)
