"""Bearer tokens: which ones can be sent in a header."""


def require_plain_token(token: str | None, subject: str) -> None:
    """ValueError, without the token, when it has blanks, line breaks or other than ASCII characters."""
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError(
            f"{subject} has a blank, a line break or a character beyond ASCII, which an HTTP header "
            "cannot carry: set its environment variable again without (a file's last line break counts)"
        )
