"""The report is one file that needs no network, and says what the manifest says."""

import re
from html.parser import HTMLParser

import pytest


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.outside, self.pictures = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and value and not value.startswith(("data:", "#")):
                self.outside.append(value)
            self.pictures += tag == "img" and name == "src"


@pytest.fixture
def text(bundle):
    return (bundle.path / "report.html").read_text()


def test_it_is_self_contained(text):
    page = Page(text)
    assert not page.outside
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert "url(http" not in text
    assert page.tags.count("svg") == 4
    assert page.pictures == 2 * (2 + 3)  # two engines: worst pass, worst reject, three normals


def test_it_says_what_the_manifest_says(text, bundle):
    manifest = bundle.manifest
    plain = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))
    assert f"{manifest.threshold.value:.4e}" in plain
    assert f"{manifest.gate.fp32.image_auroc:.4f}" in plain
    assert f"{manifest.accuracy.pixel_auroc:.4f}" in plain
    assert manifest.versions["openvino"] in plain
    assert manifest.teacher.sha256[:16] in plain
    for words in (
        "INT8 qad mse",
        "the defect with the lowest score",
        "the good part with the highest score",
        "layer2.0 downsample",
        "fine-tuning",
        "largest drop",
    ):
        assert words in plain, words


def test_its_hash_is_in_the_manifest(bundle):
    assert "report.html" in bundle.manifest.files


def test_fp32_has_no_comparison(bundles):
    text = (bundles["fp32"].path / "report.html").read_text()
    assert "INT8" not in text
    assert "Quantisation error" not in text
    assert Page(text).pictures == 2 + 3
