import numpy as np
import pytest

from torchgraft.data.dataset import ArrayPictures, ImageDataset


def make(n=5):
    array = np.arange(n, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    return ImageDataset(ArrayPictures(array), [i % 2 for i in range(n)], [f"p{i}" for i in range(n)])


def test_without_a_transform_the_item_is_an_rgb_picture_and_a_label():
    picture, label = make()[3]
    assert (picture.mode, picture.getpixel((0, 0)), label) == ("RGB", (3, 3, 3), 1)


def test_a_transform_is_seen_through_a_copy_and_leaves_the_original_alone():
    data = make()
    bright = data.with_transform(lambda p: p.getpixel((0, 0))[0] + 100)
    assert (bright[2], data[2][0].mode) == ((102, 0), "RGB")
    assert bright.image(2).getpixel((0, 0)) == (2, 2, 2)


def test_a_subset_of_a_subset_keeps_pictures_labels_and_ids_together():
    part = make().with_transform(lambda p: p.getpixel((0, 0))[0]).subset([4, 2, 1]).subset([2, 0])
    assert (part.ids, part.labels) == (["p1", "p4"], [1, 0])
    assert [part[i] for i in range(len(part))] == [(1, 1), (4, 0)]


def test_labels_that_do_not_match_the_pictures_are_refused():
    with pytest.raises(ValueError, match="5 pictures, 4 labels"):
        ImageDataset(ArrayPictures(np.zeros((5, 2, 2), np.uint8)), [0] * 4, ["x"] * 5)


def test_the_fingerprint_tells_pixels_labels_names_and_order_apart():
    prints = [make().fingerprint(), make(6).fingerprint(), make().subset([1, 0, 2, 3, 4]).fingerprint()]
    other = make()
    other.labels[0] = 1
    prints.append(other.fingerprint())
    other = make()
    other._pictures.array[4, 0, 0] += 1
    prints.append(other.fingerprint())
    assert len(set(prints)) == 5
    assert make().fingerprint() == prints[0]


def test_the_fingerprint_of_a_source_that_tells_nothing_decodes_pictures():
    class Silent(ArrayPictures):
        stamp = None

    def of(array):
        return ImageDataset(Silent(array), [0] * len(array), [str(i) for i in range(len(array))]).fingerprint()

    dark, one = np.zeros((3, 4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8)
    one[2] = 9
    assert of(dark) == of(dark.copy())
    assert of(dark) != of(one)
