"""Whether a response holds what its request asked for: arrays, rows, widths."""

from opd.teacher.wire import Want, WireRequest, WireResponse


def require_answer(response: WireResponse, request: WireRequest) -> WireResponse:
    """The response; ``ValueError`` unless it holds what was requested, a row for each target."""
    rows, width = len(request.targets()), request.support_width()
    expected: dict[str, tuple[int, ...]] = {"logps": (rows,)}
    if width:
        expected |= dict.fromkeys(("support_ids", "support_logps"), (rows, width))
        expected["support_tail"] = (rows,)
    if request.want is Want.full_logps:
        expected["full_logps"] = (rows, request.vocab_size)
    if response.outside is not None:
        expected["outside"] = (rows,)
    for name, shape in expected.items():
        found = getattr(response, name)
        if found is None or found.shape != shape:
            held = "absent" if found is None else list(found.shape)
            raise ValueError(f"{name} is {held}, expected {list(shape)}")
    hidden = response.hidden
    if request.want is Want.hidden and (hidden is None or hidden.ndim != 2 or len(hidden) != rows):
        held = "absent" if hidden is None else list(hidden.shape)
        raise ValueError(f"hidden is {held}, expected [{rows}, D]")
    return response
