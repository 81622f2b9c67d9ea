import numpy as np
import pytest
from PIL import Image

from torchgraft.data import open_image
from torchgraft.data.images import unreadable
from torchgraft.errors import GraftError

from .conftest import cut_off, save_picture


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)).save(tmp_path / "x.png")
    assert np.asarray(open_image(tmp_path / "x.png"))[..., 1].tolist() == [[0, 100], [200, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_common_mode_is_read_as_rgb(tmp_path, mode):
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode).save(path)
    image = open_image(path)
    assert image.mode == "RGB"
    assert np.asarray(image).min() > 250


def test_the_cameras_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert open_image(tmp_path / "x.jpg").size == (4, 8)


def test_a_picture_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    with pytest.raises(GraftError, match=r"nowhere\.png: there is no such file"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(GraftError, match=r"x\.jpg: .*truncated"):
        open_image(cut_off(save_picture(tmp_path / "x.jpg", size=(64, 64))))
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(GraftError, match="floating-point"):
        open_image(tmp_path / "x.tif")


def test_the_check_decodes_to_the_end_and_finds_what_headers_hide(tmp_path):
    paths = [save_picture(tmp_path / f"{i}.{kind}", size=(96, 96)) for i in range(30) for kind in ("jpg", "png")]
    bad = [3, 40, 41]
    for i in bad:
        cut_off(paths[i])
        with Image.open(paths[i]) as image:
            assert image.size == (96, 96), "the header must still be readable for this test to mean anything"
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    assert sorted(unreadable([*paths, tmp_path / "float.tif"])) == [*bad, 60]
