"""Images as files and as arrays: decoding and encoding, finding them below a folder, tiles, crops, near-duplicates."""
