"""What a recipe decides from what it measured. Pure: numbers in, indices out."""

from __future__ import annotations

from collections.abc import Sequence

from app.errors import LaunchError

GROUPS = (128, 64, 32)


def blocks_to_keep(influence: Sequence[float], keep: int, drop: int) -> list[int]:
    """The indices of the blocks that stay, ascending: the most influential ones, and always the first and the last.

    `keep` counts blocks; 0 means all but `drop`. Raises LaunchError where that leaves fewer than two or drops none.
    """
    count = len(influence)
    wanted = keep or count - drop
    if not 2 <= wanted < count:
        raise LaunchError(f"a model of {count} blocks cannot be pruned to {wanted}: from 2 to {count - 1} can stay")
    inner = sorted(range(1, count - 1), key=lambda block: (influence[block], block))
    dropped = set(inner[: count - wanted])
    return [block for block in range(count) if block not in dropped]


def uniform_width(width: int, share: float, multiple: int) -> int:
    """`share` of `width`, rounded to a multiple. Raises LaunchError where nothing would be left, or nothing cut."""
    if multiple < 1 or not 0 < share < 1:
        raise LaunchError("share lies between 0 and 1, multiple is 1 at least")
    chosen = round(width * share / multiple) * multiple
    if not 0 < chosen < width:
        raise LaunchError(f"{share:g} of {width} channels, as a multiple of {multiple}, is {chosen}: nothing to prune")
    return chosen


def uniform_heads(heads: int, groups: int, share: float, *, whole: bool) -> tuple[int, int]:
    """How many query heads and groups stay: `share` of the groups where they go as a `whole`, else of each one's heads.

    Raises LaunchError where nothing would be left, or nothing cut.
    """
    size = heads // groups
    count = groups if whole else size
    chosen = round(count * share)
    if not 0 < chosen < count:
        what = "groups" if whole else "heads of a group"
        raise LaunchError(f"{share:g} of {count} {what} is {chosen}: from 1 to {count - 1} can stay")
    return (size * chosen, chosen) if whole else (groups * chosen, groups)


def heads_to_keep(importance: Sequence[float], groups: int, kept: tuple[int, int]) -> list[int]:
    """The query heads that stay, ascending: of the most important groups the most important heads, as many in each.

    `importance` is that of each query head, group by group; `kept` how many heads and groups stay.
    """
    size = len(importance) // groups
    parts = [range(group * size, (group + 1) * size) for group in range(groups)]
    stay = most([sum(importance[head] for head in part) for part in parts], kept[1])
    each = kept[0] // kept[1]
    return [parts[group][head] for group in stay for head in most([importance[head] for head in parts[group]], each)]


def most(values: Sequence[float], count: int) -> list[int]:
    """The indices of the `count` highest values, ascending; of equal ones the first."""
    ranked = sorted(range(len(values)), key=lambda index: (-values[index], index))
    return sorted(ranked[:count])


def group_size(columns: Sequence[int], wanted: int) -> int:
    """How many weights share a scale: `wanted`, or where that is 0 the largest usual number that divides all columns.

    Raises LaunchError where it divides not all of them: kernels take whole groups only.
    """
    for group in (wanted,) if wanted else GROUPS:
        if all(column % group == 0 for column in columns):
            return group
    tried = str(wanted) if wanted else ", ".join(map(str, GROUPS))
    raise LaunchError(
        f"groups of {tried} do not divide the layers' {', '.join(map(str, sorted(set(columns))))} columns"
    )


def windows(tokens: Sequence[int], length: int, count: int) -> list[list[int]]:
    """The first `count` samples of `length` tokens each, or as many as there are. Raises LaunchError for not one."""
    if len(tokens) < length:
        raise LaunchError(f"the calibration text has {len(tokens)} tokens, one sample alone needs {length}")
    taken = min(count, len(tokens) // length)
    return [list(tokens[start : start + length]) for start in range(0, taken * length, length)]
