r"""Cases for verifiers: values in many notations with near misses, answers in many frames.

A value's first notation is the reference answer; what stands in the same row means the same, what
stands in the second row is wrong. Only the standard library is needed, so that verifiers in
environments of their own are asked the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    """A response, what it should answer, and whether it does.

    Attributes:
        answer: the notation that the response gives, without its frame.
    """

    kind: str
    response: str
    reference: str
    right: bool
    truncated: bool = False
    answer: str = ""


# kind -> values: notations that mean the same, the reference first; near misses
NOTATIONS: dict[str, list[tuple[list[str], list[str]]]] = {
    "integers": [
        (["42", "42.", "42.0", "+42", "042", r"\text{42}", "$42$"], ["-42", "24", "420", "4.2"]),
        (["-7", "−7", r"-\,7", "(-7)", "-7.00"], ["7", "-7.1", "-77", "1/7"]),
        (["0", "0.0", "-0", r"\frac{0}{5}"], ["1", r"\emptyset", "0.1"]),
        (["5!", "120", r"\frac{720}{6}"], ["5", "25", "12"]),
        ([r"\binom{5}{2}", "10", r"\dbinom{5}{2}"], ["7", r"\binom{5}{1}", "20"]),
    ],
    "thousands": [
        (
            ["1234567", "1,234,567", "1{,}234{,}567", r"1\,234\,567", "1 234 567"],
            ["1,234,568", "1,234", "234,567", "1234.567"],
        ),
        (["10000", "10,000", "10^4", r"10{,}000", "1e4"], ["1,000", "100,000", "10", "10^5"]),
    ],
    "large integers": [
        (
            ["9007199254740993", "9,007,199,254,740,993", "9007199254740993.0"],
            ["9007199254740992", "9007199254740994.0", "9.007199254740992e15"],
        ),
        (["2^{100}", "1267650600228229401496703205376", "4^{50}"], ["2^{101}", "2^{99}"]),
        (["2^{-99}", r"\frac{1}{2^{99}}", "4^{-49.5}"], ["2^{-98}", "0", r"\frac{1}{2^{98}}"]),
        (
            ["10^{-5}", "1e-5", "0.00001", r"\frac{1}{100000}", r"1 \times 10^{-5}"],
            ["10^{-6}", "1e5", "0.0001", r"1 \times 10^{5}"],
        ),
    ],
    "fractions": [
        (
            [r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac12", "1/2", "0.5", ".5", "½", r"\frac{2}{4}"],
            [r"\frac{1}{3}", "2", "1/20", r"-\frac{1}{2}", "0.05"],
        ),
        (
            [r"-\frac{3}{4}", r"\frac{-3}{4}", r"\frac{3}{-4}", "-3/4", "-0.75", r"-\frac34"],
            [r"\frac{3}{4}", r"-\frac{4}{3}", "-0.34"],
        ),
        ([r"2\frac{1}{3}", r"\frac{7}{3}", "7/3", "2 1/3"], [r"\frac{2}{3}", "2.3", "21/3"]),
    ],
    "decimals": [
        (["3.75", "3.750", r"\frac{15}{4}", r"3\frac{3}{4}"], ["3.7", "37.5", "3.57"]),
        (
            [r"0.\overline{3}", r"\frac{1}{3}", r"0.\bar{3}", "1/3", r"0.\overline{33}"],
            ["0.3", "3", r"0.\overline{6}", r"0.0\overline{3}"],
        ),
        ([r"0.1\overline{6}", r"\frac{1}{6}", r"0.1\bar{6}"], [r"0.\overline{16}", "0.16"]),
    ],
    "percentages": [
        (["25\\%", "25%", r"25\,\%", "25 percent", "25"], ["2.5%", "75%", "0.025"]),
        (["12.5\\%", "12.5%", "0.125", "12.5"], ["1.25%", "125", "12%"]),
    ],
    "scientific": [
        (
            [r"3 \times 10^{8}", "3e8", "300000000", r"3 \cdot 10^8", "3*10^8", "3.0E+8"],
            [r"3 \times 10^{7}", "3e-8", "30", r"30 \times 10^{8}"],
        ),
        ([r"6.02 \times 10^{23}", "6.02e23", r"602 \times 10^{21}"], [r"6.02 \times 10^{22}"]),
    ],
    "roots and powers": [
        (
            [r"2\sqrt{2}", r"\sqrt{8}", r"2 \sqrt2", "2√2", r"2^{3/2}", r"\frac{4}{\sqrt{2}}"],
            [r"\sqrt{2}", r"3\sqrt{2}", r"2\sqrt{3}", "2.8"],
        ),
        ([r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}", r"3^{-1/2}"], [r"\sqrt{3}", r"\frac13"]),
        ([r"\sqrt[3]{2}", r"2^{1/3}", r"2^{\frac{1}{3}}"], [r"\sqrt{2}", r"3\sqrt{2}"]),
        ([r"1+\sqrt{5}", r"\sqrt{5}+1", r"\frac{2+2\sqrt5}{2}"], [r"1-\sqrt{5}", r"\sqrt{6}"]),
    ],
    "constants": [
        ([r"2\pi", r"\pi \cdot 2", r"2 \pi", "2π", r"\pi+\pi"], [r"\pi", r"3\pi", r"\pi^2", "6.3"]),
        ([r"\frac{\pi}{6}", r"\pi/6", r"\frac{1}{6}\pi"],
         [r"\frac{\pi}{3}", r"\frac{6}{\pi}"]),
        ([r"e^{2}", r"e^2", r"\exp(2)"], [r"e", r"2e", r"e^{-2}"]),
        ([r"\ln 2", r"\ln(2)", r"\log_e 2"], [r"\ln 3", r"2", r"\log_{10} 2"]),
        ([r"\log_2 3", r"\frac{\ln 3}{\ln 2}", r"\log_{2}(3)"], [r"\log_3 2", r"\log 3"]),
        ([r"\frac{\pi}{10^8}", r"\pi \times 10^{-8}"], ["0", "0.0000001", r"\frac{\pi}{10^7}"]),
    ],
    "expressions": [
        (
            ["x^2-1", "(x-1)(x+1)", "-1+x^2", "x^2 - 1", r"x \cdot x - 1"],
            ["x^2+1", "x-1", "(x-1)^2", "1-x^2", "y^2-1"],
        ),
        (["3x+6", "3(x+2)", "6+3x"], ["3x+2", "3x-6", "x+2", "9"]),
        ([r"\frac{x}{y}", "x/y", r"x y^{-1}"], [r"\frac{y}{x}", "xy"]),
        (["2ab", r"2 \cdot a \cdot b", "2ba", "ab+ab"], ["2a+b", "ab", "2", "2AB"]),
        ([r"a^{m+n}", r"a^m a^n", "a^{n+m}"], [r"a^{mn}", "a^m + a^n"]),
        ([r"\sin^2 x", r"(\sin x)^2", r"1-\cos^2 x"], [r"\cos^2 x", r"\sin x^2"]),
        (["n!", "n(n-1)!"], ["n", "(n-1)!", "n^2"]),
    ],
    "equations": [
        (["y=2x+1", "y = 1+2x", "2x+1 = y", "$y=2x+1$"], ["y=2x-1", "y=x+1", "x=2y+1"]),
        (["x=5", "5", "x = 5", "5 = x", r"x=\frac{10}{2}"], ["x=-5", "2x=5", "x=6", "x+5"]),
        (["10", "x=10"], ["2x=10", "x+y=10", "x=1"]),
        (["3", "1+2"], ["1+1=3", "x=2", "3x"]),
    ],
    "inequalities": [
        (["x>3", "3<x", r"x \gt 3", r"(3,\infty)"], [r"x \ge 3", "x<3", "x>-3", "3"]),
        (
            [r"-1 < x < 4", "4>x>-1", r"(-1,4)", r"-1 \lt x \lt 4"],
            [r"-1 \le x \le 4", r"-1<x<5", r"x<4"],
        ),
        ([r"x \le 2", r"x \leq 2", "x ≤ 2", r"2 \ge x", r"(-\infty,2]"], ["x<2", r"x \ge 2"]),
    ],
    "intervals": [
        ([r"[0,1)", r"\left[0,1\right)", "[0, 1)", r"0 \le x < 1"], ["(0,1)", "[0,1]", "[0,2)"]),
        (
            [r"(-\infty,0) \cup (1,\infty)", r"(1,\infty) \cup (-\infty,0)"],
            [r"(-\infty,0] \cup [1,\infty)", r"(-\infty,1)", r"(0,1)"],
        ),
        ([r"\mathbb{R}", r"(-\infty,\infty)"], [r"\mathbb{Z}", r"(0,\infty)"]),
    ],
    "tuples": [
        (["(1,2)", "(1, 2)", r"\left(1,2\right)", "$(1,2)$"], ["(2,1)", "(1,3)", r"\{1,2\}", "1"]),
        ([r"(3,\frac{\pi}{2})", r"\left(3, \pi/2\right)"], [r"(3,\pi)", r"(\frac{\pi}{2},3)"]),
        (["(0,-3,4)", "(0, -3, 4)"], ["(0,3,4)", "(0,-3)", "(-3,0,4)"]),
    ],
    "sets and lists": [
        (
            [r"\{1,2,3\}", r"\{3,2,1\}", "1,2,3", "1, 2, 3", "1, 2 and 3", r"\left\{1,2,3\right\}"],
            [r"\{1,2\}", r"\{1,2,4\}", "(1,2,3,4)", "123"],
        ),
        (["1,-2", "-2,1", "-2, 1", r"1 \text{ and } -2", "x=1, x=-2", "x=1 or x=-2"],
         ["1,2", "-1,2", "1", "-2"]),
        ([r"\pm 3", "3,-3", "-3, 3", r"x = \pm 3", "±3"], ["3", "-3", r"\pm 9"]),
        ([r"1 \pm \sqrt{2}", r"1+\sqrt2, 1-\sqrt2"], [r"1+\sqrt{2}", r"-1 \pm \sqrt{2}"]),
        ([r"\emptyset", r"\varnothing", "∅", r"\{\}"], ["0", r"\{0\}", "1"]),
    ],
    "matrices": [
        (
            [
                r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
                r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
                r"\begin{bmatrix}1&2\\3&4\end{bmatrix}",
            ],
            [
                r"\begin{pmatrix}1&3\\2&4\end{pmatrix}",
                r"\begin{pmatrix}1&2\\3&5\end{pmatrix}",
                r"\begin{pmatrix}1&2\end{pmatrix}",
            ],
        ),
        (
            [
                r"\begin{pmatrix}1/2\\-1\end{pmatrix}",
                r"\begin{pmatrix}\frac12\\-1\end{pmatrix}",
                r"\begin{pmatrix}0.5\\-1.0\end{pmatrix}",
            ],
            [r"\begin{pmatrix}-1\\1/2\end{pmatrix}", r"\begin{pmatrix}1/2\\1\end{pmatrix}"],
        ),
    ],
    "complex numbers": [
        (["1+2i", "2i+1", "1 + 2i", r"1+2\mathrm{i}"], ["1-2i", "2+i", "3i", "3"]),
        (["-i", r"\frac{1}{i}", "i^3", "0-i"], ["i", "-1", "1"]),
    ],
    "infinity": [
        ([r"\infty", "∞", r"+\infty"], [r"-\infty", "0", "1"]),
        ([r"-\infty", r"- \infty", "-∞"], [r"\infty", "-1"]),
    ],
    "bases": [
        (["321_8", "321_{8}", r"321_{\text{8}}", "(321)_8", "321"], ["321_7", "321_{9}", "123_8"]),
        (["2A_{16}", "2a_{16}", "2A"], ["2B_{16}", "42_{16}", "2A_{12}"]),
    ],
    "units": [
        (
            ["5 cm", r"5\text{ cm}", r"5\ \text{cm}", "5", "5 centimeters", "5cm", "50 mm"],
            ["5 m", "6 cm", "0.5 cm", "5 kg"],
        ),
        (
            [r"5\pi", r"5\pi \text{ cm}^2", r"5 \pi \text{ square units}", r"5\pi\ \mathrm{cm}^2"],
            [r"6\pi \text{ cm}^2", r"5 \text{ cm}^2"],
        ),
        (
            [r"\frac{1}{2} m", r"\frac12 \text{ m}", r"\frac{1}{2}", "0.5 m", "50 cm"],
            [r"\frac12 cm", r"\frac{1}{3} m"],
        ),
        (["60^\\circ", "60°", r"60^{\circ}", "60", "60 degrees"], ["30°", "6°", r"60^2"]),
        ([r"\$18", "$18", "18", "18 dollars", r"\$18.00", "USD 18"], ["€18", "18 cents", "180"]),
        (["75 cents", r"\$0.75", "75¢", "0.75 dollars"], ["75 dollars", r"\$75"]),
        (["60 mph", "60 miles per hour", "60", r"60 \text{ mph}"], ["60 km/h", "6 mph"]),
        (["200 minutes", "3 hours 20 minutes", "200 min", r"3\frac13 hours"],
         ["3 hours 30 minutes", "20 minutes", "200 hours"]),
    ],
    "ratios, dates and times": [
        (["3:4", "3 : 4", "6:8", r"3\!:\!4"], ["4:3", "3:5", "34"]),
        (["10:30", "10:30 AM", "10:30 a.m."], ["10:03", "9:30"]),
        (["10:30 AM", "10:30 am", "10:30 a.m."], ["10:30 PM", "10:31 AM"]),
        (["2024-05-01", "2024-05-01."], ["2024-05-02", "2024-01-05", "2018"]),
    ],
    "choices": [
        (
            ["B", "(B)", "B.", r"\text{B}", r"\textbf{(B)}", "B: 12", "(B) 12 m"],
            ["C", "A", "D: 12"],
        ),
        (["E", r"E: \text{vitamin D}", r"\text{E}"], ["D", "vitamin D"]),
    ],
    "words": [
        (["yes", "Yes", r"\text{yes}", "YES", "yes."], ["no", "maybe", "not yes"]),
        (["Evelyn", r"\text{Evelyn}", "evelyn"], ["Carla", "Evelyn and Carla"]),
        (["even", r"\text{even}", "Even"], ["odd", "neither"]),
        (["42", "forty-two", "Forty-two"], ["forty", "twenty-four"]),
        (["no solution", r"\text{no solution}", "No solution", "no solutions"], ["0", "1"]),
        (["Monday", r"\text{Monday}", "monday"], ["Tuesday", "Mon or Tue"]),
    ],
    "functions": [
        (
            [r"f(x)=x^2+1", "f(x) = 1+x^2", "x^2+1"],
            ["f(x)=x^2-1", "g(x)=x^2-1", "x^2"],
        ),
        ([r"3 \pmod 7", r"3 \pmod{7}", r"x \equiv 3 \pmod{7}", "3"], [r"4 \pmod 7", "7"]),
        ([r"f^{-1}(x)=\frac{x-1}{2}", r"\frac{x-1}{2}"], [r"\frac{x+1}{2}", "2x+1"]),
        (
            [r"\begin{cases}1&x>0\\0&x\le0\end{cases}",
             r"\begin{cases} 1 & x > 0 \\ 0 & x \le 0 \end{cases}"],
            [r"\begin{cases}0&x>0\\1&x\le0\end{cases}", "1"],
        ),
    ],
}  # fmt: skip

# a reference without its base leaves open which was asked for
ONE_WAY = frozenset(("321", "2A"))

# kind -> frames of an answer A that is right, and of an answer B that is another
VALUES = (("42", "24"), (r"\frac{1}{2}", r"\frac{1}{3}"), ("1,234", "1,235"), ("-3", "3"))
FRAMES: dict[str, list[tuple[str, bool]]] = {
    "boxes": [
        (r"So the answer is $\boxed{A}$.", True),
        (r"Thus \[\boxed{A}\]", True),
        (r"\fbox{A}", True),
        (r"First \boxed{B}. No, wait, I made a mistake: \boxed{A}", True),
        (r"First \boxed{A}. No, wait, I made a mistake: \boxed{B}", False),
        (r"\boxed{A} is the result. We have checked that the answer is correct.", True),
        (r"$$\boxed{ A }$$ This completes the proof.", True),
        (r"so we get \boxed{B", False),
        (r"so we get \boxed{A", False),
        (r"\boxed{B}. Hmm, let me redo that: \boxed{A", False),
        (r"\boxed{A} or \boxed{B}", False),
        (r"\boxed{} with A", True),
    ],
    "answer lines": [
        ("Answer: A", True),
        ("Answer:\nA", True),
        ("Answer:\n$A$", True),
        ("**Answer:** A", True),
        ("### Final Answer\n\nA", True),
        ("**Final Answer**\n\n$$A$$", True),
        ("ANSWER: A\n", True),
        ("Answer: B\n\nWait, that is wrong.\n\nAnswer: A", True),
        ("Answer: A\n\nWait, that is wrong.\n\nAnswer: B", False),
        ("Answer: not A but B", False),
        ("Answer: A or B", False),
        ("Answer: A.\nI hope this helps!", True),
    ],
    "sentences": [
        ("So the answer is A.", True),
        ("So the answer is A. Check: it fits.", True),
        ("The final answer is **A**.", True),
        ("The final answer is: $A$", True),
        ("Final Answer: The final answer is $A$. I hope it is correct.", True),
        ("Therefore, the answer is A, since it is what was asked.", True),
        ("The answer is B. Wait, no, the answer is A.", True),
        ("The answer is A. Wait, no, the answer is B.", False),
        ("The answer is not A.", False),
        ("We have to show that the answer is positive. It is A", True),
    ],
    "hashes": [
        ("so it is\n#### A", True),
        ("so it is\n#### A\nThat is how many are left.", True),
        ("#### B\nno\n#### A", True),
        ("#### A\nno\n#### B", False),
    ],
    "thoughts": [
        (r"<think>maybe B? yes, \boxed{B}</think>The answer is A.", True),
        (r"<think>it must be \boxed{A}</think>\boxed{B}", False),
        (r"<think>it must be \boxed{A}", False),
        (r"<think>it must be \boxed{A}</think>I cannot tell.", False),
        ("<think>\nA?\n</think>\n\n**Answer:** A", True),
    ],
}
CUT_FRAMES: list[tuple[str, bool]] = [
    ("Answer: A\nBecause of", True),
    (r"\boxed{A}. To check", True),
    ("The answer is A. To che", True),
    ("Answer: A", False),
    ("Answer:\nA", False),
    ("#### A", False),
    ("#### A\nT", True),
    ("First we take A and then", False),
    ("The answer is A", False),
    (r"so \boxed{A", False),
    (r"\boxed{A}. No, that is wrong; it is \boxed{B", False),
    (r"\boxed{A}. Let me correct this. Answer: ", False),
    ("<think>the answer is A.\n", False),
]


def notation_cases(frame: str = r"The answer is $\boxed{A}$.") -> Iterator[Case]:
    """Each value's notations and near misses against its first one, and the other way round.

    Args:
        frame: where an answer stands in a response, in place of its ``A``.
    """
    for kind, values in NOTATIONS.items():
        for (reference, *others), wrong in values:
            pairs = [(reference, reference, True)]
            pairs += [(other, reference, True) for other in others]
            pairs += [(reference, other, True) for other in others if other not in ONE_WAY]
            pairs += [(other, reference, False) for other in wrong]
            for answer, asked, right in pairs:
                yield Case(kind, _filled(frame, answer), asked, right, answer=answer)


def frame_cases() -> Iterator[Case]:
    """Answers that are marked in many ways, once, twice, half or not at all."""
    cut = {"cut responses": CUT_FRAMES}
    for kind, frames in (FRAMES | cut).items():
        for frame, right in frames:
            for answer, other in VALUES:
                text = _filled(frame, answer, other)
                yield Case(kind, text, answer, right, kind in cut)


def blind_cases() -> Iterator[Case]:
    """Responses that were written by somebody who knew neither these tables nor our verifier."""
    lines = Path(__file__).with_name("grading_cases.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines):
        if row["kind"].startswith("blind: "):
            cut = row.get("truncated", False)
            yield Case("written blind", row["text"], row["answer"], row["correct"], cut)


def _filled(frame: str, answer: str, other: str = "") -> str:
    """A frame with its ``A`` and ``B``, which stand by themselves, replaced."""
    words = {"A": answer, "B": other}
    out = ""
    for index, letter in enumerate(frame):
        around = frame[index - 1 : index] + frame[index + 1 : index + 2]
        out += letter if letter not in words or any(map(str.isalpha, around)) else words[letter]
    return out
