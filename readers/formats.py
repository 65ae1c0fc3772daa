"""What an image file holds: eight bits, or grey values of more, which come as the file's own counts.

Pillow reads images of eight bits, and PNG, JPEG 2000 and PFM of more. TIFF of more than eight bits is read
here, because Pillow 13.0 swaps the bytes of some such files and does not know others: tifffile, which is well
kept and needs only NumPy, says what a file holds. It needs imagecodecs (a package of 26 MB) for LZW, PackBits
and predictor 3, so the bytes are unpacked by the libtiff inside Pillow, which is right as long as they are
bytes. PGM is read here because Pillow scales it to 16 bits. The table of docs/own-data.md says what is
read, how, and what is refused.
"""

import contextlib
import io
import logging
import os
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import tifffile
from PIL import Image, UnidentifiedImageError

logging.getLogger("tifffile").addHandler(logging.NullHandler())  # what is broken is raised and named

EIGHT_BITS = "8 bits"  # the kind of every image of at most eight bits per channel
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
UNPACKED = (1, 5, 8, 32946, 32773)  # TIFF compression: none, LZW, Deflate (two numbers), PackBits
_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"  # between the words of a PGM header
PGM_HEADER = re.compile(rb"P([25])" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)\s")
EXIF_ORIENTATION = 0x0112
EXIF_MAKE = 0x010F
MANY = "it holds {} images, and only one can be used: save each as a file"


@dataclass(frozen=True)
class Opened:
    """An image file whose header was read.

    kind: what the file holds, in words; images of one kind have the same type of counts.
    width, height: as stored, in pixels.
    deep: whether it is grey of more than eight bits. Then load gives its own counts (H, W), of any number
        type, with NaN where the file says that there is no data; else it gives a Pillow image.
    orientation: by which it is to be turned upright, as EXIF counts.
    high_byte: whether it is colour of more than eight bits, of which load gives the upper eight.
    """

    kind: str
    width: int
    height: int
    deep: bool
    load: Callable[[], np.ndarray | Image.Image]
    orientation: int = 1
    high_byte: bool = False


@contextlib.contextmanager
def open_image(path: str | os.PathLike) -> Iterator[Opened]:
    """Open an image file and read its header; its pixels can be loaded until the context ends.

    Raises:
        OSError: the reason why the file cannot be used, without its name. Pillow and tifffile may raise
            nearly anything else for a broken file.
    """
    if not os.path.isfile(path):  # opening a named pipe would block
        raise OSError("not a file" if os.path.exists(path) else "no such file")
    with open(path, "rb") as stream:
        start = stream.read(4)
        stream.seek(0)
        opened = None
        if start in TIFF_MAGIC:
            opened = _open_tiff(stream)
        elif start[:2] in (b"P2", b"P5"):
            opened = _open_pgm(stream)
        if opened:
            yield _safe(opened)
            return
        stream.seek(0)
        try:
            image = Image.open(stream)
        except UnidentifiedImageError as error:
            jpeg = start[:3] == b"\xff\xd8\xff"
            raise OSError("a JPEG of other than eight bits, or broken" if jpeg else "not an image") from error
        with image:
            yield _safe(_from_pillow(image, stream))


def _safe(opened: Opened) -> Opened:
    if opened.width * opened.height > Image.MAX_IMAGE_PIXELS:
        raise OSError(f"{opened.width}x{opened.height} pixels: a decompression bomb")
    return opened


def is_deep(image: Image.Image) -> bool:
    """Whether Pillow opened the image as grey of more than eight bits; its own conversion clips at 255."""
    return image.mode == "F" or image.mode.startswith("I")


# Formats that Pillow reads


def _from_pillow(image: Image.Image, stream: io.BufferedReader) -> Opened:
    width, height = image.size
    # Not MPO, a photo and other versions of it; not TIFF, which _open_tiff has looked through.
    if image.format not in ("MPO", "TIFF") and getattr(image, "is_animated", False):
        raise OSError(MANY.format(image.n_frames))
    bits, signed = None, False
    if image.format in ("JPEG", "MPO"):
        _refuse_radiometric(image)
    elif image.format == "JPEG2000":
        bits, signed = _bits_of_jpeg_2000(stream)
        if signed or bits > 16:
            raise OSError(f"a JPEG 2000 of {'signed values' if signed else f'{bits} bits'}: save it as TIFF")
    if not is_deep(image):
        # Pillow gives only the upper 8 of 16 bits per colour channel. `tile` says so until it is loaded.
        arguments = [tile[3] for tile in getattr(image, "tile", ())]
        high_byte = (
            (bits or 8) > 8
            or any(";16" in str(argument) for argument in arguments)
            or (image.format == "PPM" and any(type(a) is tuple and a[-1] > 255 for a in arguments))
        )
        kind = "colour of more than 8 bits" if high_byte else EIGHT_BITS
        return Opened(kind, width, height, False, lambda: image, high_byte=high_byte)

    def load() -> np.ndarray:
        counts = np.asarray(image)
        unused = 16 - bits if bits else 0  # Pillow multiplies the values of JPEG 2000 to fill 16 bits
        if unused and not (counts & ((1 << unused) - 1)).any():
            counts = counts >> unused
        return counts

    return Opened("float32" if image.mode == "F" else "uint16", width, height, True, load, _turn(image))


def _turn(image: Image.Image) -> int:
    return image.getexif().get(EXIF_ORIENTATION, 1)


def _refuse_radiometric(image: Image.Image) -> None:
    """OSError if a JPEG carries a thermal camera's measurements behind its picture.

    The picture is made for the eye: its scale is its own, it may be coloured and have a scale drawn into it.
    The signatures are those that exiftool documents (FLIR, Parrot, InfiRay, DJI).
    """
    for name, data in getattr(image, "applist", ()):
        if (
            data.startswith((b"FLIR\0", b"PARROT\0", b"\xaa\x55\x12\x06"))
            or data[4:10] == b"IJPEG\0"
            or (name == "APP3" and image.getexif().get(EXIF_MAKE, "").startswith("DJI"))
        ):
            raise OSError(
                "a radiometric JPEG, whose temperatures are hidden behind a picture with a scale of its own: "
                "extract them as 16-bit PNG or TIFF (exiftool -b -RawThermalImage), or save the picture anew"
            )


def _bits_of_jpeg_2000(stream: io.BufferedReader) -> tuple[int, bool]:
    """Bits per value and whether they are signed, from the codestream's first segment (SIZ)."""
    where = stream.tell()
    stream.seek(0)
    data = stream.read()
    stream.seek(where)
    precision = data[data.index(b"\xff\x4f\xff\x51") + 42]
    return (precision & 0x7F) + 1, precision > 0x7F


def _open_pgm(stream: io.BufferedReader) -> Opened | None:
    """Read a PGM's header; None: it has at most eight bits, and Pillow reads it."""
    header = PGM_HEADER.match(stream.read())
    if not header or int(header[4]) <= 255:
        return None
    plain = header[1] == b"2"  # numbers as text
    width, height, maximum = (int(header[group]) for group in (2, 3, 4))
    if maximum > 65535:
        raise OSError(f"a PGM with a maximum of {maximum}, more than 65535")

    def load() -> np.ndarray:
        stream.seek(header.end())
        number = width * height
        words = stream.read().split()[:number] if plain else stream.read(2 * number)
        if len(words) < (number if plain else 2 * number):
            raise OSError("truncated")
        counts = np.array(words, dtype=np.uint16) if plain else np.frombuffer(words, ">u2")
        return counts.reshape(height, width)

    return Opened("uint16", width, height, True, load)


# TIFF


def _open_tiff(stream: io.BufferedReader) -> Opened | None:
    """Read a TIFF's header; None: it has at most eight bits, and Pillow reads it."""
    tiff = tifffile.TiffFile(stream)
    if not len(tiff.pages):
        raise OSError("not an image")
    page = tiff.pages[0]
    count = 1 + sum(not tiff.pages[k].subfiletype & 1 for k in range(1, len(tiff.pages)))  # 1: a smaller copy
    count = max(count, page.imagedepth, (tiff.imagej_metadata or {}).get("images", 1))
    if count > 1:
        raise OSError(MANY.format(count))
    bits, kind = page.bitspersample, {1: "u", 2: "i", 3: "f"}.get(page.sampleformat, "?")
    if isinstance(bits, tuple):
        bits = max(bits)
    if bits <= 8 and kind == "u" and not tiff.is_bigtiff:
        return None
    white_is_zero, colour = page.photometric == 0, page.photometric == 2
    alpha = len(page.extrasamples) == 1 and (colour or page.extrasamples[0] in (1, 2))
    samples = page.samplesperpixel - alpha
    what = f"a TIFF of {page.samplesperpixel} x {bits} bits"
    if bits not in {"u": (8, 16, 32, 64), "i": (8, 16, 32, 64), "f": (16, 32, 64)}.get(kind, ()):
        bits_read = "unsigned and signed integers of 8, 16, 32, 64 bits, floating point of 16, 32, 64"
        raise OSError(f"{what}, {_name(page, 'sampleformat')}: read are {bits_read}")
    if page.photometric not in (0, 1, 2) or samples != (3 if colour else 1) or (colour and kind != "u"):
        raise OSError(f"{what}, {_name(page, 'photometric')}: read are grey, and colour of unsigned integers")
    if white_is_zero and kind != "u":
        raise OSError(f"{what} that are not unsigned, but say that 0 is white: save it with 0 as black")
    if page.compression not in UNPACKED or page.predictor not in (1, 2, 3) or page.fillorder != 1:
        raise OSError(
            f"a TIFF packed by {_name(page, 'compression')}: save it unpacked, or with LZW or Deflate"
        )

    def load() -> np.ndarray | Image.Image:
        counts = _tiff_values(page)
        if colour:
            return Image.fromarray((counts >> (bits - 8)).astype(np.uint8))
        counts = counts[..., 0]
        if white_is_zero:
            return np.iinfo(counts.dtype).max - counts
        if 42113 in page.tags:  # GDAL's no-data value
            return np.where(counts == page.nodata, np.nan, counts)
        return counts

    turn = page.tags.valueof(274, default=1)
    width, height = page.imagewidth, page.imagelength
    if colour:
        name = EIGHT_BITS if bits == 8 else "colour of more than 8 bits"
        return Opened(name, width, height, False, load, turn, high_byte=bits > 8)
    if bits == 8 and kind == "u":  # a BigTIFF
        return Opened(EIGHT_BITS, width, height, False, lambda: Image.fromarray(load()), turn)
    name = {"u": "uint", "i": "int", "f": "float"}[kind] + str(bits) + ", 0 is white" * white_is_zero
    return Opened(name, width, height, True, load, turn)


def _name(page: tifffile.TiffPage, key: str) -> str:
    value = getattr(page, key)
    return getattr(value, "name", f"{key} {value}")


def _tiff_values(page: tifffile.TiffPage) -> np.ndarray:
    """The values (H, W, samples) of a TIFF's page, in the machine's byte order."""
    samples, planes = page.samplesperpixel, 1
    if page.planarconfig == 2:
        samples, planes = 1, samples
    if page.is_tiled:
        across, down = page.tilewidth, page.tilelength
    else:
        across, down = page.imagewidth, min(page.rowsperstrip, page.imagelength)
    width = -(-page.imagewidth // across) * across  # with the padding of the last tiles
    height = -(-page.imagelength // down) * down if page.is_tiled else page.imagelength
    pixel = samples * page.dtype.itemsize
    segments = []
    for offset, length in zip(page.dataoffsets, page.databytecounts, strict=True):
        page.parent.filehandle.seek(offset)
        segments.append(page.parent.filehandle.read(length))
    each = len(segments) // planes
    parts = []
    for plane in range(planes):
        part = segments[plane * each : (plane + 1) * each]
        rows = _unpack(
            part, height, width * pixel, down, across * pixel if page.is_tiled else 0, page.compression
        )
        tiles = rows.reshape(height, width // across, across * pixel)
        values = _undo_predictor(tiles, page.dtype, page.parent.byteorder, samples, page.predictor)
        parts.append(values.reshape(height, width, samples)[: page.imagelength, : page.imagewidth])
    return parts[0] if planes == 1 else np.concatenate(parts, axis=2)


def _unpack(
    segments: list[bytes], height: int, width: int, down: int, across: int, compression: int
) -> np.ndarray:
    """The bytes (height, width) uint8 of a TIFF's tiles, or, if across is 0, of its strips of `down` rows.

    They are put into a TIFF of eight-bit grey, which Pillow's libtiff decodes without touching their meaning.
    """
    lengths = [len(segment) for segment in segments]
    tags = {256: [width], 257: [height], 258: [8], 259: [compression], 262: [1], 277: [1]}
    if across:
        tags |= {322: [across], 323: [down], 324: lengths, 325: lengths}
    else:
        tags |= {273: lengths, 278: [down], 279: lengths}
    after = 8 + 2 + 12 * len(tags) + 4  # the header, the number of tags, the tags, no further page
    first = after + sum(4 * len(values) for values in tags.values() if len(values) > 1)
    offsets = np.cumsum([first, *lengths])[:-1].tolist()
    tags[324 if across else 273] = offsets
    entries, outside = b"", b""
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(values) > 1:
            packed, outside = struct.pack("<I", after + len(outside)), outside + packed
        entries += struct.pack("<HHI", tag, 4, len(values)) + packed
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + outside
    with Image.open(io.BytesIO(header + b"".join(segments)), formats=["TIFF"]) as image:
        return np.asarray(image)


def _undo_predictor(
    tiles: np.ndarray, dtype: np.dtype, byteorder: str, samples: int, predictor: int
) -> np.ndarray:
    """Bytes (H, tiles, bytes of a tile's row) as values (H, tiles, values of a tile's row).

    Predictor 2 (horizontal) stores differences of neighbours; 3 (floating point) those of bytes, the rows'
    most significant bytes first: TIFF Technical Note 3.
    """
    height, number, _ = tiles.shape
    item = dtype.itemsize
    if predictor == 3:
        tiles = np.cumsum(tiles.reshape(height, number, -1, samples), axis=2, dtype=np.uint8)
        tiles = tiles.reshape(height, number, item, -1).swapaxes(2, 3)
        byteorder = ">"
    values = np.ascontiguousarray(tiles).view(dtype.newbyteorder(byteorder)).reshape(height, number, -1)
    values = values.astype(dtype.newbyteorder("="), copy=False)
    if predictor == 2:
        unsigned = values.view(f"u{item}").reshape(height, number, -1, samples)
        values = np.cumsum(unsigned, axis=2, dtype=unsigned.dtype).view(dtype.newbyteorder("="))
    return values.reshape(height, number, -1)
