"""Files as damage, or someone with bad intentions, leaves them."""

import zlib


def alter(data, rng):
    """Flip bits, set, cut, add or move bytes of a file, at random."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        place, kind = int(rng.integers(len(data) + 1)), int(rng.integers(7))
        run = int(rng.integers(1, 9))
        if kind == 0 and place < len(data):
            data[place] ^= 1 << int(rng.integers(8))
        elif kind == 1 and place < len(data):
            data[place] = int(rng.choice([0, 1, 127, 128, 255]))
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            del data[place : place + run]
        elif kind == 4:
            data[place:place] = rng.bytes(run)
        elif kind == 5:
            data[place : place + run] = rng.bytes(run)
        else:
            # The numbers of the header stand in the first bytes.
            if len(data) > 31:
                data[int(rng.integers(4, 31))] = int(rng.integers(256))
    return bytes(data)


def sealed(data):
    """Put the checksum right again, as only a program does."""
    body = data[:-4]
    return body + zlib.crc32(body).to_bytes(4, "little")
