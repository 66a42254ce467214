"""stub"""


def write_report(question, rows, found, out):
    return out / "report.html"
