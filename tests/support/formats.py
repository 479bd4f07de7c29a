"""Documents for tests, made on the spot: PDF, Office files, pages, and hostile ones."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence

import openpyxl
import pptx
import pypdf


def pdf(
    pages: Sequence[str], bookmarks: Sequence[tuple[str, int, int]] = (), password: str = "", title: str = ""
) -> bytes:
    """A PDF with lines of text, and bookmarks: title, page from 0, level from 0."""
    writer = pypdf.PdfWriter()
    for text in pages:
        lines = "".join(f"({line}) Tj 0 -14 Td " for line in text.split("\n"))
        page = raw_pdf(f"BT /F1 12 Tf 50 700 Td {lines} ET".encode()) if text else raw_pdf(b"")
        writer.add_page(pypdf.PdfReader(io.BytesIO(page)).pages[0])
    above: list[object] = []
    for name, number, level in bookmarks:
        parent = above[level - 1] if level else None
        above[level:] = [writer.add_outline_item(title=name, page_number=number, parent=parent)]  # type: ignore[arg-type]
    if title:
        writer.add_metadata({"/Title": title})
    if password:
        writer.encrypt(password)
    file = io.BytesIO()
    writer.write(file)
    return file.getvalue()


def raw_pdf(stream: bytes, more: bytes = b"") -> bytes:
    """A PDF of one page with this content, whose dictionary has `more` fields."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d%s>>stream\n%s\nendstream" % (len(stream), more, stream),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    out, places = b"%PDF-1.4\n", b""
    for number, content in enumerate(objects, 1):
        places += b"%010d 00000 n \n" % len(out)
        out += b"%d 0 obj%sendobj\n" % (number, content)
    end = b"trailer<</Size 6/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF" % len(out)
    return out + b"xref\n0 6\n0000000000 65535 f \n" + places + end


def pdf_bomb() -> bytes:
    """A page whose content is compressed twice, and 100 MB without."""
    packed = zlib.compress(zlib.compress(b"\0" * 1_000_000 * 100, 1))
    return raw_pdf(packed, b"/Filter[/FlateDecode/FlateDecode]")


def endless_page() -> bytes:
    """A page of HTML that would be read for hours."""
    return b"<!doctype html><body><pre>" + b"x <b>y</b>\n" * 300_000 + b"</pre>"


def archive(*names: str, claimed: int | None = None) -> bytes:
    """A zip archive of these files, all of which say that they have `claimed` bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        for name in names:
            packed.writestr(name, "<a/>")
    content = file.getvalue()
    if claimed is not None:
        head, *entries = content.split(b"PK\x01\x02")
        content = b"PK\x01\x02".join([head, *(e[:20] + struct.pack("<I", claimed) + e[24:] for e in entries)])
    return content


def xlsx(rows: Sequence[Sequence[object]], sheet: str = "Prices") -> bytes:
    """A workbook of one sheet."""
    book = openpyxl.Workbook()
    book.active.title = sheet
    for row in rows:
        book.active.append(row)
    file = io.BytesIO()
    book.save(file)
    return file.getvalue()


def slides(*titles: str) -> bytes:
    """A presentation with a slide for each title."""
    show = pptx.Presentation()
    for title in titles:
        slide = show.slides.add_slide(show.slide_layouts[1])
        slide.shapes.title.text = title
        slide.placeholders[1].text = f"The text of {title}. " * 12
    file = io.BytesIO()
    show.save(file)
    return file.getvalue()


def docx(*paragraphs: tuple[str, str]) -> bytes:
    """A Word file with paragraphs of these styles (`Heading1`, or empty)."""
    space = "http://schemas.openxmlformats.org"
    body = "".join(
        f'<w:p><w:pPr><w:pStyle w:val="{style}"/></w:pPr><w:r><w:t>{text}</w:t></w:r></w:p>'
        for style, text in paragraphs
    )
    styles = "".join(
        f'<w:style w:type="paragraph" w:styleId="Heading{n}"><w:name w:val="heading {n}"/></w:style>' for n in (1, 2)
    )
    word = f"{space}/wordprocessingml/2006/main"
    office, kind = (
        f"{space}/officeDocument/2006/relationships",
        "application/vnd.openxmlformats-officedocument.wordprocessingml",
    )
    relations = f'<Relationships xmlns="{space}/package/2006/relationships"><Relationship Id="r1" Type="{office}'
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{space}/package/2006/content-types"><Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/word/document.xml" ContentType="{kind}.document.main+xml"/></Types>',
        "_rels/.rels": f'{relations}/officeDocument" Target="word/document.xml"/></Relationships>',
        "word/_rels/document.xml.rels": f'{relations}/styles" Target="styles.xml"/></Relationships>',
        "word/document.xml": f'<w:document xmlns:w="{word}"><w:body>{body}</w:body></w:document>',
        "word/styles.xml": f'<w:styles xmlns:w="{word}">{styles}</w:styles>',
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        for name, text in parts.items():
            packed.writestr(name, text)
    return file.getvalue()
