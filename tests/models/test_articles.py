import bz2
from pathlib import Path

import pytest

from entangle.models.demo import clean, read_pages

PAGE = "<page><title>{}</title><ns>{}</ns>{}<revision><text>{}</text></revision></page>"


def test_pages_are_articles_in_order(tmp_path: Path) -> None:
    pages = [
        PAGE.format("One", 0, "", "first &lt;b&gt;bold&lt;/b&gt;"),
        PAGE.format("Talk:One", 1, "", "chat"),
        PAGE.format("Uno", 0, '<redirect title="One"/>', "#REDIRECT [[One]]"),
        PAGE.format("One (disambiguation)", 0, "", "list {{Disambiguation}}"),
        PAGE.format("Empty", 0, "", ""),
        PAGE.format("Two", 0, "", "second"),
    ]
    export = f'<mediawiki xmlns="http://example.org/export/">{"".join(pages)}</mediawiki>'
    (tmp_path / "x.bz2").write_bytes(bz2.compress(export.encode()))
    got = list(read_pages(tmp_path / "x.bz2"))
    assert got == [("One", "first <b>bold</b>"), ("Empty", ""), ("Two", "second")]


CASES = {
    "plain": ("Just a text.", "Just a text."),
    "bold and italics": ("'''A''' is ''b''.", "A is b."),
    "links": ("[[A]] and [[B|the b]]s, [http://x.org site].", "A and the bs, site."),
    "bare link": ("See [http://x.org].", "See."),
    "files": ("A[[File:x.jpg|thumb|A [[cat]] here]] b[[Category:C]][[fr:A]].", "A b."),
    "reference": ('A<ref name="x/y">{{cite|t}}</ref> b<ref name=x /> c.', "A b c."),
    "two references": ("A<ref>x</ref> mid <ref>y</ref>b", "A mid b"),
    "comment": ("A <!-- no -->b.", "A b."),
    "entities": ("A&nbsp;&ndash; b &amp; c", "A – b & c"),
    "templates": ("A{{sfn|x|2000}} b{{citation needed|date=x}}.", "A b."),
    "named parameters": ("{{lang|fr|texte|cat=no}} {{nowrap|a b}} {{IPAc-en|x}}", "texte a b"),
    "nested": ("{{quote|He said {{lang|la|veni}} ''here''.|Who}}", "He said veni here."),
    "quantity": ("It is {{convert|5|km|mi|abbr=on}} long.", "It is 5 km long."),
    "quantity range": ("{{convert|5|to|10.5|sqmi|km2}} big", "5 to 10.5 sq mi big"),
    "chemistry": ("{{chem|H|2|O}} is H<sub>2</sub>O", "H2O is H2O"),
    "since": ("{{As of|2010}}, {{frac|1|2}}", "As of 2010, 1/2"),
    "pronunciation": ("Aa ({{IPA-xx|a}}; born 1900) b", "Aa (born 1900) b"),
    "empty brackets": ("Aa ({{IPA-xx|a}}) b ( , ) c", "Aa b c"),
    "table": ('A\n{| class="x"\n! h\n|-\n| cell\n|}\nb', "A\n\nb"),
    "unclosed table": ("A\n{| x\n! h\n| cell\nb", "A\n\nb"),
    "formula": ("A <math>x^2</math> b", "A b"),
    "list": ("* one\n* two\n: three", "one\ntwo\nthree"),
    "break": ("a<br />b", "a\nb"),
    "unclosed italics": ("the Iliad'''s end", "the Iliad's end"),
    "unclosed file": ("A\n[[File:x.svg|thumb|Structure:\nb", "A\n\nb"),
    "unclosed link": ("A [[b c", "A b c"),
    "code": ("call <code>f(x)</code>", "call f(x)"),
    "decimal": ("about .5 and a ; b", "about .5 and a; b"),
    "magic word": ("__NOTOC__a", "a"),
    "nothing": ("", ""),
    "only markup": ("{{x}}\n\n[[Category:C]]", ""),
}


@pytest.mark.parametrize("case", CASES)
def test_clean(case: str) -> None:
    markup, expected = CASES[case]
    assert clean(markup) == expected


def test_sections() -> None:
    markup = (
        "Lead.\n\n\n==History==\n===Early===\nOld.\n==Empty==\n{|\n|x\n|}\n==Deep==\n===Deeper===\n"
        "==See also==\n* [[X]]\n===Books===\n* Y\n==Legacy==\nLate.\n== External links ==\n* z\n"
    )
    assert clean(markup) == "Lead.\n\nHistory\n\nEarly\n\nOld.\n\nLegacy\n\nLate."
