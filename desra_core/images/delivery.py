from desra_core.images.codec import encode_png


def read_origin(data, path):
    return None


def encode_picture(pixels, alpha, format, *, quality, origin, colour):
    return encode_png(pixels, alpha)
