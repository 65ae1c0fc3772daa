"""readers/formats.py: each grey format gives the file's own counts, or is refused with the reason.

The files are written by tifffile, by Pillow, or by hand after the formats' specifications. tests/golden has
what needs an encoder: 12-bit JPEG and JPEG 2000 of the ramp 100 to 4000, written by imagecodecs 2026.3.6.
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from conftest import ramp, save_values
from PIL import Image

from images import UnreadableImages, read_image
from readers.formats import EIGHT_BITS, open_image

GOLDEN = Path(__file__).parent / "golden"
COUNTS = ramp(29000, 31500, np.uint16, (37, 50))  # more than one tile, and parts of tiles
TWELVE = ramp(100, 4000, np.uint16)  # what tests/golden holds


def load(path):
    with open_image(path) as opened:
        return np.asarray(opened.load())


def kind(path):
    with open_image(path) as opened:
        return opened.kind


def refused(path, words):
    with pytest.raises(UnreadableImages, match=words) as error:
        read_image(path, 20, 8, (0, 65535))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


# --- TIFF, written by hand


def lzw(data):
    """TIFF's LZW without a dictionary: each byte is a code of nine bits, after a Clear every 250 of them."""
    codes = []
    for start in range(0, len(data), 250):
        codes += [256, *data[start : start + 250]]
    bits = "".join(f"{code:09b}" for code in [*codes, 257])
    return int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")


def packbits(data):
    parts = [data[start : start + 128] for start in range(0, len(data), 128)]
    return b"".join(bytes([len(part) - 1]) + part for part in parts)


PACKERS = {1: bytes, 5: lzw, 8: zlib.compress, 32946: zlib.compress, 32773: packbits}


def predict(rows, predictor, order):
    """Rows (H, W) as bytes, of the byte order, after TIFF's predictor."""
    if predictor == 2:
        unsigned = rows.view(f"u{rows.itemsize}")
        rows = np.concatenate([unsigned[:, :1], unsigned[:, 1:] - unsigned[:, :-1]], axis=1)
    if predictor == 3:
        planes = rows.astype(rows.dtype.newbyteorder(">")).view(np.uint8).reshape(*rows.shape, rows.itemsize)
        planes = planes.swapaxes(1, 2).reshape(len(rows), -1)
        return np.concatenate([planes[:, :1], planes[:, 1:] - planes[:, :-1]], axis=1).tobytes()
    return rows.astype(rows.dtype.newbyteorder(order)).tobytes()


def write_tiff(path, values, order="<", compression=1, predictor=1, tile=None, rows=16, tags=()):
    """A TIFF of one grey page, by the specification (TIFF 6.0, and Technical Note 3 for predictor 3)."""
    height, width = values.shape
    if tile:
        padded = np.pad(values, [(0, -height % tile), (0, -width % tile)])
        parts = [
            padded[y : y + tile, x : x + tile] for y in range(0, height, tile) for x in range(0, width, tile)
        ]
        layout = {322: [tile], 323: [tile]}
    else:
        parts = [values[y : y + rows] for y in range(0, height, rows)]
        layout = {278: [rows]}
    parts = [PACKERS[compression](predict(np.ascontiguousarray(p), predictor, order)) for p in parts]
    kinds = {"u": 1, "i": 2, "f": 3}
    entries = {
        256: [width], 257: [height], 258: [8 * values.itemsize], 259: [compression], 262: [1], 277: [1],
        317: [predictor], 339: [kinds[values.dtype.kind]], **layout, **dict(tags),
    }  # fmt: skip
    lengths = [len(part) for part in parts]
    entries[325 if tile else 279] = lengths
    entries[324 if tile else 273] = (8 + np.cumsum([0, *lengths[:-1]])).tolist()
    body, directory = b"".join(parts), b""
    for tag, numbers in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            packed, body = struct.pack(f"{order}I", 8 + len(body)), body + packed
        directory += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + packed
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(body))
    path.write_bytes(head + body + struct.pack(f"{order}H", len(entries)) + directory + bytes(4))
    return path


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "i1"])
def test_tiff_gives_its_own_counts_however_it_is_packed(tmp_path, order, dtype):
    values = ramp(-100, 100, dtype, (37, 50)) if dtype in ("i1", "f2") else COUNTS.astype(dtype)
    if dtype[0] == "i" and dtype != "i1":
        values = values - 30000 if dtype == "i2" else -values
    if dtype == "u4":
        values = values + np.uint32(2**31)
    for compression in PACKERS:
        for predictor in (1, 3) if dtype[0] == "f" else (1, 2):
            for tile in (None, 16):
                case = f"compression {compression}, predictor {predictor}, tile {tile}"
                path = write_tiff(tmp_path / "a.tif", values, order, compression, predictor, tile)
                with open_image(path) as opened:
                    found = opened.load()
                    assert opened.deep, case
                    assert (opened.height, opened.width) == values.shape
                    assert opened.kind == {"u": "uint", "i": "int", "f": "float"}[dtype[0]] + str(
                        8 * values.itemsize
                    )
                np.testing.assert_array_equal(found, values, err_msg=case)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("dtype", ["u2", "i2", "u4", "i4", "f2", "f4", "f8"])
def test_what_tifffile_writes_is_read(tmp_path, byteorder, bigtiff, compression, dtype):
    values = COUNTS.astype(dtype) if dtype != "i2" else (COUNTS - 30000).astype(dtype)
    tifffile.imwrite(
        tmp_path / "a.tif", values, byteorder=byteorder, bigtiff=bigtiff, compression=compression,
        predictor=bool(compression) and dtype[0] != "f", photometric="minisblack",
    )  # fmt: skip
    np.testing.assert_array_equal(load(tmp_path / "a.tif"), values)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "packbits", "tiff_deflate"])
def test_what_pillow_writes_is_read(tmp_path, compression):
    for values in (COUNTS, COUNTS.astype(np.int32), COUNTS.astype(np.float32)):
        Image.fromarray(values).save(tmp_path / "a.tif", compression=compression)
        np.testing.assert_array_equal(load(tmp_path / "a.tif"), values)


def test_a_missing_piece_of_a_tiff_is_named(tmp_path):
    path = write_tiff(tmp_path / "a.tif", COUNTS, compression=5)
    for cut in (300, len(path.read_bytes()) - 60):
        (tmp_path / "b.tif").write_bytes(path.read_bytes()[:cut])
        refused(tmp_path / "b.tif", r"b\.tif \(")


@pytest.mark.parametrize("bigtiff", [False, True])
def test_white_is_zero_is_turned_at_8_and_at_16_bits(tmp_path, bigtiff):
    for dtype, most in (("u1", 255), ("u2", 65535), ("u4", 2**32 - 1)):
        values = ramp(10, 200, dtype)
        tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite", bigtiff=bigtiff)
        np.testing.assert_array_equal(load(tmp_path / "a.tif"), most - values)
    assert kind(tmp_path / "a.tif") == "uint32, 0 is white"  # so that a mix of both is told of
    tifffile.imwrite(tmp_path / "a.tif", ramp(0, 9, "f4"), photometric="miniswhite")
    refused(tmp_path / "a.tif", "0 is white: save it with 0 as black")


def colours(dtype, low=1000, high=60000):
    return np.stack([ramp(low, high - 500 * k, dtype) for k in range(3)], axis=2)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("alpha", [False, True])
def test_sixteen_bit_colour_of_a_tiff_keeps_its_high_byte(tmp_path, planar, byteorder, compression, alpha):
    values = colours(np.uint16)
    stored = np.concatenate([values, values[..., :1]], axis=2) if alpha else values
    tifffile.imwrite(
        tmp_path / "a.tif", np.moveaxis(stored, 2, 0) if planar == "separate" else stored, photometric="rgb",
        planarconfig=planar, byteorder=byteorder, compression=compression, predictor=bool(compression),
        extrasamples=["unassalpha"] if alpha else None,
    )  # fmt: skip
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", 20, 8), values >> 8)


def test_alpha_beside_grey_is_dropped(tmp_path):
    values = ramp(29000, 31500, np.uint16)
    for planar, axis in (("contig", 2), ("separate", 0)):
        stored = np.stack([values, values[::-1]], axis)
        tifffile.imwrite(
            tmp_path / "a.tif",
            stored,
            photometric="minisblack",
            extrasamples=["unassalpha"],
            planarconfig=planar,
        )
        np.testing.assert_array_equal(load(tmp_path / "a.tif"), values)


def test_values_that_a_file_calls_no_data_are_none(tmp_path):
    values = ramp(290, 310, np.float32)
    values[3, 3] = -9999
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=[(42113, 2, 0, "-9999", True)])
    found = load(tmp_path / "a.tif")
    assert np.isnan(found[3, 3])
    assert np.isnan(found).sum() == 1


def test_the_orientation_of_a_tiff_is_applied(tmp_path):
    upright = np.zeros((20, 10), np.uint16)
    upright[:10] = 60000
    path = write_tiff(tmp_path / "a.tif", np.rot90(upright).copy(), tags=[(274, [6])])
    pixels = read_image(path, 20, 10)
    assert pixels[:9].min() > 200
    assert pixels[11:].max() < 30


def pages(path):
    tifffile.imwrite(path, np.stack([TWELVE] * 3), photometric="minisblack")


def imagej(path):
    tifffile.imwrite(path, np.stack([TWELVE] * 5), imagej=True)


def imagej_in_one_page(path):
    """As ImageJ writes stacks of more than 4 GB: one directory, the others only in its description."""
    text = b"ImageJ=1.53t\nimages=2\nslices=2\n\0"
    tifffile.imwrite(path, TWELVE, metadata=None, extratags=[(270, 2, len(text), text, True)])
    path.write_bytes(path.read_bytes() + TWELVE.tobytes())


def ome(path):
    tifffile.imwrite(path, np.stack([TWELVE] * 4), metadata={"axes": "TYX"}, ome=True)


def volume(path):
    tifffile.imwrite(
        path, np.stack([TWELVE] * 16), volumetric=True, tile=(16, 16, 16), photometric="minisblack"
    )


def gif(path):
    frames = [Image.new("L", (8, 20), value) for value in (0, 90, 200)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def eight_bit_pages(path):
    tifffile.imwrite(path, np.zeros((2, 20, 8), np.uint8), photometric="minisblack")


MANY = {
    "a.tif": (pages, 3),
    "b.tif": (imagej, 5),
    "c.tif": (imagej_in_one_page, 2),
    "d.ome.tif": (ome, 4),
    "e.tif": (volume, 16),
    "f.tif": (eight_bit_pages, 2),
    "g.gif": (gif, 3),
    "h.png": (gif, 3),
    "i.webp": (gif, 3),
}


@pytest.mark.parametrize("name", MANY)
def test_a_file_of_several_images_is_refused(tmp_path, name):
    make, number = MANY[name]
    make(tmp_path / name)
    refused(tmp_path / name, f"it holds {number} images, and only one can be used: save each as a file")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_page_and_its_smaller_copies_are_one_image(tmp_path, dtype):
    values = TWELVE.astype(dtype)
    with tifffile.TiffWriter(tmp_path / "a.tif", ome=False) as file:
        file.write(values, subifds=1, photometric="minisblack")
        file.write(values[::2, ::2], subfiletype=1, photometric="minisblack")
        file.write(values[::4, ::4], subfiletype=1, photometric="minisblack")
    np.testing.assert_array_equal(load(tmp_path / "a.tif"), values)
    tifffile.imwrite(tmp_path / "b.ome.tif", values, ome=True)
    np.testing.assert_array_equal(load(tmp_path / "b.ome.tif"), values)


def write(**words):
    return lambda path: tifffile.imwrite(path, **words)


def twelve_bit_packed(path):
    write_tiff(path, np.zeros((4, 6), np.uint8), tags=[(258, [12]), (256, [4])])


REFUSED = {
    "complex": (write(data=TWELVE.astype("c8"), photometric="minisblack"), "COMPLEX"),
    "five bands": (write(data=np.ones((20, 8, 5), "u2"), planarconfig="contig"), "5 x 16 bits"),
    "colour in floats": (write(data=np.ones((20, 8, 3), "f4"), photometric="rgb"), "colour of unsigned"),
    "palette of 16 bits": (
        write(data=TWELVE, photometric="palette", colormap=np.zeros((3, 65536), "u2")), "PALETTE",
    ),
    "CMYK of 16 bits": (write(data=np.ones((20, 8, 4), "u2"), photometric="separated"), "SEPARATED"),
    "packed twelve bits": (twelve_bit_packed, "1 x 12 bits"),
    "another compression": (lambda path: write_tiff(path, TWELVE, tags=[(259, [50000])]), "packed by ZSTD"),
    "bits from the right": (lambda path: write_tiff(path, TWELVE, tags=[(266, [2])]), "TIFF"),
    "grey in colour channels": (
        write(data=np.stack([COUNTS] * 3, 2), photometric="rgb"), "grey in colour channels",
    ),
    "narrow colours": (write(data=colours("u2", 51241, 52181), photometric="rgb"), "upper 8 bits"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_tiff_that_is_not_read_rightly_is_refused_by_name(tmp_path, case):
    make, words = REFUSED[case]
    make(tmp_path / "a.tif")
    refused(tmp_path / "a.tif", words)


def test_tiffs_of_eight_bits_are_left_to_pillow(tmp_path):
    grey = Image.fromarray(ramp(0, 255, np.uint8))
    for name, image, words in (
        ("grey", grey, {}),
        ("lzw", grey, {"compression": "tiff_lzw"}),
        ("palette", grey.quantize(16), {}),
        ("fax", grey.convert("1"), {"compression": "group4"}),
        ("cmyk", grey.convert("CMYK"), {}),
        ("jpeg", grey.convert("RGB"), {"compression": "jpeg"}),
    ):
        image.save(tmp_path / f"{name}.tif", **words)
        assert kind(tmp_path / f"{name}.tif") == EIGHT_BITS
        with Image.open(tmp_path / f"{name}.tif") as expected:
            np.testing.assert_array_equal(
                read_image(tmp_path / f"{name}.tif", 20, 8), np.asarray(expected.convert("RGB"))
            )


# --- Netpbm, JPEG 2000, PNG, JPEG


def test_pgm_of_any_maximum_gives_the_counts_of_a_png(tmp_path):
    numbers = " ".join(map(str, TWELVE.ravel()))
    raster = TWELVE.astype(">u2").tobytes()
    for name, content in {
        "12 bits": b"P5\n8 20\n4095\n" + raster,
        "14 bits": b"P5 8 20 16383 " + raster,
        "16 bits": b"P5\n8 20\n65535\n" + raster,
        "comments": b"P5\n# " + b"x" * 5000 + b"\n8 # wide\n20\n#\n4095\n" + raster,
        "text": f"P2\n8 20\n4095\n{numbers}\n".encode(),
    }.items():
        path = tmp_path / f"{name}.pgm"
        path.write_bytes(content)
        np.testing.assert_array_equal(load(path), TWELVE, err_msg=name)
        assert kind(path) == "uint16"
        png = save_values(tmp_path / "a.png", TWELVE)
        np.testing.assert_array_equal(read_image(path, 20, 8, (0, 4095)), read_image(png, 20, 8, (0, 4095)))
    (tmp_path / "a.pgm").write_bytes(b"P5\n8 20\n4095\n" + raster[:-1])
    refused(tmp_path / "a.pgm", "truncated")
    (tmp_path / "a.pgm").write_bytes(b"P5\n8 20\n70000\n" + raster)
    refused(tmp_path / "a.pgm", "more than 65535")


def test_a_ppm_of_sixteen_bits_is_read_or_refused(tmp_path):
    def ppm(values):
        (tmp_path / "a.ppm").write_bytes(b"P6\n8 20\n65535\n" + values.astype(">u2").tobytes())
        return tmp_path / "a.ppm"

    pixels = read_image(ppm(colours(np.uint16)), 20, 8).astype(int)
    assert np.abs(pixels - (colours(np.uint16) >> 8)).max() <= 1
    refused(ppm(colours(np.uint16, 51241, 52181)), "upper 8 bits")
    refused(ppm(np.stack([COUNTS[:20, :8]] * 3, 2)), "grey in colour channels")


def test_jpeg_2000_of_twelve_bits_gives_its_own_counts(tmp_path):
    np.testing.assert_array_equal(load(GOLDEN / "grey_12_bits.jp2"), TWELVE)
    assert kind(GOLDEN / "grey_12_bits.jp2") == "uint16"
    refused(GOLDEN / "grey_signed.jp2", "signed values: save it as TIFF")
    path = save_values(tmp_path / "a.jp2", COUNTS)
    np.testing.assert_array_equal(load(path), COUNTS)


def test_a_jpeg_of_twelve_bits_is_refused():
    refused(GOLDEN / "grey_12_bits.jpg", "a JPEG of other than eight bits, or broken")


def write_png(path, values):
    """A PNG of 16 bits a channel, which Pillow cannot write: grey with alpha (2 channels), RGB or RGBA."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def test_sixteen_bit_colour_of_a_png_keeps_its_high_byte_or_is_refused(tmp_path):
    rgb = colours(np.uint16)
    rgba = np.concatenate([rgb, rgb[..., :1]], axis=2)
    for values in (rgb, rgba):
        np.testing.assert_array_equal(read_image(write_png(tmp_path / "a.png", values), 20, 8), rgb >> 8)
    grey = ramp(29000, 31500, np.uint16)
    for channels in (2, 3, 4):
        path = write_png(tmp_path / "a.png", np.stack([grey] * channels, axis=2))
        refused(path, "grey in colour channels of more than eight bits: save it as a grey image")
    refused(write_png(tmp_path / "a.png", colours(np.uint16, 51241, 52181)), "upper 8 bits")


def jpeg_with(marker, segment, exif=None):
    """A JPEG with one more segment, after those of a camera."""
    buffer = io.BytesIO()
    words = {"exif": exif} if exif else {}
    Image.linear_gradient("L").save(buffer, "JPEG", **words)
    data = buffer.getvalue()
    at = data.index(b"\xff\xdb")  # the quantization tables follow the camera's segments
    return data[:at] + bytes([0xFF, marker]) + struct.pack(">H", len(segment) + 2) + segment + data[at:]


def dji():
    exif = Image.Exif()
    exif[0x010F] = "DJI"
    return exif


RADIOMETRIC = {
    "FLIR": (0xE1, b"FLIR\0\x01\0\0FFF\0" + bytes(64), None),
    "Parrot": (0xE1, b"PARROT\0II*\0" + bytes(64), None),
    "InfiRay": (0xE2, b"\0\0\0\1IJPEG\0" + bytes(64), None),
    "DJI": (0xE3, bytes(64), dji()),
    "DJI's parameters": (0xE4, b"\xaa\x55\x12\x06" + bytes(64), None),
}


@pytest.mark.parametrize("camera", RADIOMETRIC)
def test_a_radiometric_jpeg_is_refused(tmp_path, camera):
    (tmp_path / "a.jpg").write_bytes(jpeg_with(*RADIOMETRIC[camera]))
    refused(tmp_path / "a.jpg", "a radiometric JPEG, .*exiftool -b -RawThermalImage")


def test_other_segments_of_a_jpeg_are_no_measurements(tmp_path):
    for marker, segment in ((0xE1, b"Exif\0\0"), (0xE2, b"ICC_PROFILE\0\1\1" + bytes(64)), (0xE3, bytes(64))):
        (tmp_path / "a.jpg").write_bytes(jpeg_with(marker, segment))
        assert kind(tmp_path / "a.jpg") == EIGHT_BITS
        read_image(tmp_path / "a.jpg", 20, 8)


def test_a_photo_with_other_versions_of_itself_is_one_image(tmp_path):
    photo, small = Image.linear_gradient("L"), Image.linear_gradient("L").resize((40, 40))
    photo.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[small])
    assert kind(tmp_path / "a.jpg") == EIGHT_BITS
