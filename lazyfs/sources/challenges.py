"""HTTP authentication challenges (RFC 9110, section 11.6.1), as registries send them."""

from __future__ import annotations

import re

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'\s*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|({_TOKEN}))\s*(?:,|$)')
_SCHEME = re.compile(rf"\s*({_TOKEN})(?:\s+|$|\s*,)")
_MAX_CHALLENGE_CHARS = 16384


def parse_challenges(header: str) -> list[tuple[str, dict[str, str]]]:
    """The challenges of a WWW-Authenticate header (RFC 9110 section 11.6.1): (lower-case scheme, parameters).

    Parsing ends at what does not follow the grammar; what was read before counts.
    """
    out: list[tuple[str, dict[str, str]]] = []
    position = 0
    header = header[:_MAX_CHALLENGE_CHARS]
    while position < len(header):
        if out and (parameter := _PARAMETER.match(header, position)) is not None:
            value = parameter[3] if parameter[2] is None else re.sub(r"\\(.)", r"\1", parameter[2])
            out[-1][1].setdefault(parameter[1].lower(), value)
            position = parameter.end()
        elif (scheme := _SCHEME.match(header, position)) is not None:
            out.append((scheme[1].lower(), {}))
            position = scheme.end()
        else:
            break
    return out


def parse_challenge(header: str) -> tuple[str, dict[str, str]]:
    """The challenge to answer: the first Bearer one, else the first Basic one, else ("", {})."""
    challenges = parse_challenges(header)
    for wanted in ("bearer", "basic"):
        for scheme, parameters in challenges:
            if scheme == wanted:
                return scheme, parameters
    return "", {}
