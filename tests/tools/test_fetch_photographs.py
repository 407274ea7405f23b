import io

import pytest
from PIL import Image

from tools import fetch_photographs


@pytest.mark.parametrize(
    ("size", "wanted"), [((900, 600), (300, 200)), ((600, 900), (200, 300)), ((150, 90), (150, 90))]
)
def test_pictures_are_shrunk_by_their_shorter_side_and_never_enlarged(size, wanted):
    file = io.BytesIO()
    Image.new("L", size, 90).save(file, "JPEG")
    image = fetch_photographs.shrunk(file.getvalue(), 200)
    assert image.size == wanted and image.mode == "RGB"
    assert abs(image.getpixel((5, 5))[0] - 90) < 3


def test_a_command_that_fails_ends_the_tool_with_its_last_line(tmp_path):
    with pytest.raises(SystemExit, match="cat nothing failed.*No such file"):
        fetch_photographs.run("cat", "nothing", folder=tmp_path)
