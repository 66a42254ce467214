"""The tokenizers of student and teacher, where the teacher has its own."""

from opd.config.schema import Config
from opd.data.tokenizer import StudentTokenizer, adds_first_space, read_tokenizer
from opd.teacher.own_tokenizer import Ends, TokenizerPair


def tokenizer_pair(config: Config, student: StudentTokenizer) -> tuple[TokenizerPair, int]:
    """Both tokenizers, and the number of rows of the teacher's head."""
    assert config.teacher.model is not None, "a rule requires teacher.model with tokenizer=own"
    teacher = read_tokenizer(config.teacher.model, setting="teacher.model")
    pair = TokenizerPair(
        student.tokenizer,
        teacher.tokenizer,
        student_ends=_ends(student),
        teacher_ends=_ends(teacher),
        first_space=adds_first_space(teacher.tokenizer),
    )
    return pair, teacher.vocab_size


def _ends(tokenizer: StudentTokenizer) -> Ends:
    return Ends(stop_ids=tokenizer.stop_ids, text=tokenizer.end_id, turn=tokenizer.turn_end_id)
