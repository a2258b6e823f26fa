"""Images as files and as arrays: decoding, encoding, finding them below a folder, tiles, crops."""
