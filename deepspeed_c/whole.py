"""The full shape of a parameter, whether or not ZeRO stage 3 has taken its data away."""


def whole(p):
    """A tensor in a parameter's full shape and memory order: itself, or what ZeRO stage 3 keeps of it beside."""
    return vars(p).get("ds_full", p)
