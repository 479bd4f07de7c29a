"""The built-in patterns of `redact`."""

from __future__ import annotations

from collections.abc import Callable

import regex

from llama_smart_proxy.agents.redact.matching import Matcher


def _luhn(text: str) -> int:
    """The length of a valid card number, else 0 (ISO/IEC 7812: the Luhn algorithm)."""
    digits = [int(char) for char in text if char.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return 0 if (sum(doubled) + sum(digits[-1::-2])) % 10 else len(text)


def _iban(text: str) -> int:
    """The length of the longest prefix of whole groups with valid check digits (ISO 13616: the number modulo 97 is 1):
    a word in capitals may follow the number."""
    while len(plain := text.replace(" ", "")) >= 15:
        if int("".join(str(int(char, 36)) for char in plain[4:] + plain[:4])) % 97 == 1:
            return len(text)
        text = text.rpartition(" ")[0]
    return 0


def _preset(name: str, pattern: str, check: Callable[[str], int] = len) -> Matcher:
    return Matcher(name, regex.compile(pattern), f"[{name}]", check)


PRESETS = {
    matcher.name: matcher
    for matcher in (
        _preset("email", r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])"),
        _preset("phone", r"(?<![\w+.])\+\d{1,3}(?:[ ./-]?(?:\(\d{1,4}\)|\d{1,4})){2,6}(?!\d)"),
        _preset(
            "credit_card",
            r"(?<![\w-])(?:\d{4}([ -])\d{4}\1\d{4}\1\d{1,7}|\d{4}([ -])\d{6}\2\d{5}|\d{13,19})(?![\w-])",
            _luhn,
        ),
        _preset("iban", r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)", _iban),
        _preset("ipv4", r"(?<![\d.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\d.]\d)"),
        _preset(
            "api_key",
            r"(?<!\w)(?:sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|xox[abprs]-[A-Za-z0-9-]{10,}"
            r"|(?:AKIA|ASIA)[A-Z0-9]{16}|hf_[A-Za-z0-9]{30,}|AIza[\w-]{35}|glpat-[\w-]{20,})(?![\w-])",
        ),
        _preset("jwt", r"(?<!\w)eyJ[\w-]{5,}(?:\.[\w-]+){1,2}"),
        _preset(
            "private_key",
            r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----"
            r"(?:[\w+/=:,\s-]*?-----END [A-Z ]{0,30}PRIVATE KEY-----|[\w+/=:,\s-]*)",
        ),
    )
}
"""Patterns by name. Check digits are verified where the format has them. Patterns of long values also match their
beginnings, so that an answer that exceeds the delay does not pass them."""
