"""Pictures of pairs: out of a file beside the rows, a text in a row, or bytes in a table.

In:  what a row has as ``image`` or ``images``, and the folder that paths count from.
Out: ``Image``, in RGB and shrunk; or ``PictureError``, a reason that can stand beside a bad row.

Rows come from somebody else, so nothing in them is trusted. A path stays in the folder of its file, nothing is fetched,
only plain raster formats are opened, a picture is verified and then read whole, and its size is known before a pixel is
unpacked: a few bytes can claim to be gigabytes.
"""

import base64
import binascii
import io
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from motet.records import Image

MOST_PIXELS = 64_000_000
"""Width times height of the largest picture that is opened."""
MOST_BYTES = 64 * 1024 * 1024
"""Size of the largest file, or text, that is opened as a picture."""
LONGEST = 512
"""Pixels to which the longer side is shrunk, unless somebody says otherwise."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is opened; of one with several frames the first. Formats that run programs, such as EPS, are not among them."""
COLUMNS = ("image", "images")
"""Columns of a row that may hold its picture."""


class PictureError(ValueError):
    """Why something is no picture that can be read."""


def opened(payload: bytes, longest: int | None = None, formats: tuple[str, ...] = FORMATS) -> Image:
    """The picture in some bytes.

    Args:
        payload: A whole file.
        longest: Pixels to which the longer side is shrunk; left out, the picture stays as it is.
        formats: Those that are tried, as Pillow calls them.

    Raises:
        PictureError: It is of none of these formats, damaged, or too large.
    """
    from PIL import Image as Pillow
    from PIL import UnidentifiedImageError

    if len(payload) > MOST_BYTES:
        raise PictureError(f"a picture must have at most {MOST_BYTES:,} bytes, got {len(payload):,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a size that is looked at below, and of odd metadata
            with Pillow.open(io.BytesIO(payload), formats=formats) as found:
                _check_size(found)
                found.verify()
            with Pillow.open(io.BytesIO(payload), formats=formats) as found:  # verifying uses it up
                return _plain(found, longest)
    except PictureError:
        raise
    except Pillow.DecompressionBombError:
        raise PictureError(f"a picture must have at most {MOST_PIXELS:,} pixels, got far more") from None
    except UnidentifiedImageError:
        raise PictureError(f"it is no picture of a format that is read: {', '.join(formats)}") from None
    except Exception as error:  # decoders raise a dozen kinds on damaged files: of structs, indices, zlib, types
        raise PictureError(f"it is no whole picture ({_short(str(error) or type(error).__name__)})") from None


def shrunk(found: Any, longest: int) -> Image:
    """A ``PIL.Image`` in RGB, its longer side shrunk to ``longest`` pixels."""
    found.draft("RGB", (2 * longest, 2 * longest))  # a JPEG need not be unpacked whole to be shrunk
    plain = opaque(found)
    return Image.of(plain.reduce(max(1, max(plain.size) // (2 * longest))), longest)


def opaque(found: Any) -> Any:
    """A ``PIL.Image`` in RGB, see-through parts laid on white, as a page shows it."""
    if found.mode not in ("RGBA", "LA", "PA") and "transparency" not in found.info:
        return found.convert("RGB")
    from PIL import Image as Pillow

    whole = found.convert("RGBA")
    page = Pillow.new("RGBA", whole.size, (255, 255, 255, 255))
    page.alpha_composite(whole)
    return page.convert("RGB")


class Pictures:
    """The pictures of one source, each kept once however many rows are about it.

    Args:
        home: The folder that paths count from and may not leave; ``None`` where the source has none.
        longest: Pixels to which the longer side is shrunk.
    """

    def __init__(self, home: Path | None, longest: int = LONGEST) -> None:
        self.home, self.longest = home, longest
        self._files: dict[Path, Image] = {}
        self._known: dict[str, Image] = {}

    def of(self, row: Mapping[str, Any]) -> Image | None:
        """The one picture of a row; nothing where it has none.

        Raises:
            PictureError: It has several, or one that cannot be read.
        """
        given = {name: row.get(name) for name in COLUMNS if not _absent(row.get(name))}
        if not given:
            return None
        if len(given) > 1:
            raise PictureError("a row has its picture in image or in images, this one has both")
        ((name, value),) = given.items()
        if isinstance(value, list | tuple):
            if len(value) != 1:
                raise PictureError(f"a pair is about exactly one picture, {name} has {len(value)}")
            value = value[0]
        found = self._read(name, value)
        return self._known.setdefault(found.digest, found)

    def _read(self, name: str, value: Any) -> Image:
        if isinstance(value, Mapping):  # as datasets and Parquet files hold pictures
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if isinstance(value, bytes | bytearray):
            return opened(bytes(value), self.longest)
        if isinstance(value, str):
            return self._said(name, value)
        if callable(getattr(value, "tobytes", None)) and hasattr(value, "getbands"):  # as datasets decodes a picture
            return _decoded(value, self.longest)
        raise PictureError(
            f"{name} must be a path, base64, or bytes with a path beside them, got {type(value).__name__}"
        )

    def _said(self, name: str, text: str) -> Image:
        """A data address, base64, or a path: only a path has a dot."""
        if text.startswith("data:"):
            head, comma, body = text.partition(",")
            if not comma or not head.endswith(";base64"):
                raise PictureError(f"a data address of {name} must be base64: data:image/png;base64,…")
            return opened(_unpacked(name, body), self.longest)
        if "://" in text[:16]:
            raise PictureError(f"{name} is an address, and nothing is fetched; put the picture beside the file")
        if "." not in text:
            return opened(_unpacked(name, text), self.longest)
        path = self._path(name, text)
        if path not in self._files:
            self._files[path] = opened(_content(path, text), self.longest)
        return self._files[path]

    def _path(self, name: str, text: str) -> Path:
        """Where a path leads, if that is in the folder; whatever system it was written for."""
        if self.home is None:
            raise PictureError(f"{name} is a path, {_short(text)!r}, and this source has no folder that it counts from")
        ways = (PurePosixPath(text), PureWindowsPath(text))
        if any(way.anchor or ".." in way.parts for way in ways):
            raise PictureError(f"a path in {name} must stay in the folder of its file, got {_short(text)!r}")
        try:
            home = self.home.resolve()
            path = (home / text).resolve()
            if not path.is_relative_to(home):
                raise PictureError(f"a path in {name} must stay in the folder of its file, {_short(text)!r} leads out")
            if not path.is_file():
                raise PictureError(f"there is no picture {_short(text)!r} in the folder of the file")
        except (OSError, RuntimeError) as error:  # a name too long, links in a circle
            raise PictureError(f"the path {_short(text)!r} leads nowhere ({type(error).__name__})") from None
        except ValueError as error:
            raise error if isinstance(error, PictureError) else PictureError(f"{name} is no path") from None
        return path


def _absent(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, list | tuple) and not value)


def _content(path: Path, text: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MOST_BYTES + 1)
    except OSError as error:
        raise PictureError(f"the picture {_short(text)!r} cannot be read ({error.strerror})") from None


def _unpacked(name: str, text: str) -> bytes:
    if len(text) > 2 * MOST_BYTES:
        raise PictureError(f"a picture must have at most {MOST_BYTES:,} bytes, {name} has far more")
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise PictureError(f"{name} is neither base64 nor the name of a picture, got {_short(text)!r}") from None


def _decoded(value: Any, longest: int) -> Image:
    """Of a ``PIL.Image``, which may have read no more of its file than the head."""
    try:
        _check_size(value)
        return _plain(value, longest)
    except PictureError:
        raise
    except Exception as error:  # see ``opened``
        raise PictureError(f"it is no whole picture ({_short(str(error) or type(error).__name__)})") from None


def _plain(found: Any, longest: int | None) -> Image:
    from PIL import ImageOps

    if longest is None:
        return Image.of(opaque(found))
    found.draft("RGB", (2 * longest, 2 * longest))
    return shrunk(ImageOps.exif_transpose(found), longest)  # the way up in which everybody else shows it


def _check_size(found: Any) -> None:
    if found.width * found.height > MOST_PIXELS:
        raise PictureError(
            f"a picture must have at most {MOST_PIXELS:,} pixels, got {found.width:,} by {found.height:,}; shrink it"
        )
    if found.mode == "F" or found.mode.startswith("I"):  # made RGB, all that is brighter than 255 would be white
        raise PictureError(f"a picture must have 8 bits a channel, got mode {found.mode!r}; convert it")


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"
