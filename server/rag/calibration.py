"""How similar two texts are in an embedding space that have nothing to do with each other: what a similarity is to be measured against.

Some models put any two texts at 0.8, others at 0.05: a threshold means something only beside this.
"""

from collections.abc import Sequence

import numpy as np

from server.domain.generation import EmbedRole
from server.domain.rag_indexes import Calibration
from server.rag.embedding import LoadedModel

# Per character. Words that a model knows take 0.2 to 0.3 of a token for each, spelled ones 0.75 to 0.9 (measured on MiniLM).
SPELLED_TOKENS = 0.6
MIN_SUBJECTS = 8  # whose pairs are 56
PERCENTS = (0.0, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 98.0, 99.0, 99.5, 100.0)

# Questions and passages, one of each per subject and no subject twice: a question with the passage of another subject is an unrelated pair.
SUBJECTS = (
    (
        "How long does bread dough have to rise?",
        "Knead flour, water and yeast, then leave it in a warm place for two hours.",
    ),
    ("When was the first telescope built?", "Lens makers in Middelburg combined two glasses in 1608 so that distant ships seemed near."),
    (
        "What do hedgehogs eat in autumn?",
        "Before winter it fattens itself on beetles, worms and caterpillars at the edge of the wood.",
    ),
    ("How is a bicycle tyre repaired?", "Roughen the tube around the hole, spread rubber cement and press the patch on."),
    (
        "Who may vote in a municipal election?",
        "Every citizen over eighteen who has lived in the town for three months is registered.",
    ),
    ("Why does iron rust?", "In damp air oxygen combines with the metal and a brittle reddish layer forms on its surface."),
    (
        "How many strings does a violin have?",
        "It is tuned in fifths, from the low G to the bright E, and played with a horsehair bow.",
    ),
    (
        "What is a deductible in car insurance?",
        "After an accident the driver pays the first part of the damage, the company the rest.",
    ),
    (
        "When do tomatoes have to be planted?",
        "Seedlings go into the bed after the last frost, well apart and tied to stakes.",
    ),
    ("How does a vaccine protect?", "The body meets a harmless piece of the virus and learns to make antibodies."),
    (
        "What does the offside rule say?",
        "A player may not be nearer to the goal line than the second last defender.",
    ),
    ("How is a parcel sent abroad?", "Fill in the customs form at the counter, name the content and its value, and keep the receipt."),
    ("كيف تُصنع القهوة العربية؟", "تُحمّص حبوب البن ثم تُطحن وتُغلى مع الهيل وتُقدَّم في فناجين صغيرة."),
    ("متى تُزرع أشجار الزيتون؟", "تُغرس الشتلات في أواخر الشتاء في تربة جيدة الصرف وعلى مسافات متباعدة."),
    ("ما سبب المد والجزر؟", "يرتفع ماء البحر وينخفض مرتين كل يوم بفعل جاذبية القمر والشمس."),
    ("كم عدد لاعبي فريق كرة السلة؟", "يدخل الملعب خمسة لاعبين من كل فريق ويحاولون إدخال الكرة في السلة المعلقة."),
    ("كيف يُجدَّد جواز السفر؟", "يقدّم المواطن الطلب مع صورتين حديثتين ويدفع الرسوم في مكتب الجوازات."),
    ("ما فائدة فيتامين د؟", "يساعد التعرض لأشعة الشمس الجسم على امتصاص الكالسيوم وتقوية العظام."),
    ("من اخترع آلة الطباعة؟", "صنع صائغ من ماينتس حروفًا معدنية متحركة فصار نسخ الكتب أسرع وأرخص."),
    ("كيف تتكوّن الكثبان الرملية؟", "تحمل الرياح حبات الرمل وتكدّسها خلف العوائق في أكوام تتحرك مع الزمن."),
    ("ما هي ضريبة القيمة المضافة؟", "تضيف المتاجر نسبة إلى ثمن السلعة وتوردها إلى الخزانة كل ثلاثة أشهر."),
    ("كيف يُعزف على العود؟", "يضع العازف الآلة على فخذه وينقر أوتارها بريشة ويضغط عليها باليد اليسرى."),
    ("لماذا تهاجر اللقالق؟", "تطير الطيور جنوبًا قبل البرد بحثًا عن الغذاء وتعود إلى أعشاشها في الربيع."),
    ("كيف يُصلَح صنبور الماء؟", "يُغلق المحبس الرئيسي ثم تُفك القطعة العليا وتُبدَّل الحلقة المطاطية التالفة."),
)


def choose_subjects(loaded: LoadedModel) -> Sequence[tuple[str, str]]:
    """Give the subjects in languages that the model reads; all of them where it seems to read none.

    A model that was not made for a script spells it letter by letter, and finds all of it alike: that says nothing of other texts.
    """
    counts = loaded.tokenizer.count_tokens([passage for _, passage in SUBJECTS])
    read = [subject for subject, count in zip(SUBJECTS, counts, strict=True) if count < SPELLED_TOKENS * len(subject[1])]
    return read if len(read) >= MIN_SUBJECTS else SUBJECTS


def calibrate(loaded: LoadedModel) -> Calibration:
    """Embed the questions as queries and the passages as passages, and measure all pairs of different subjects."""
    subjects = choose_subjects(loaded)
    questions = loaded.encode([question for question, _ in subjects], EmbedRole.QUERY)
    passages = loaded.encode([passage for _, passage in subjects], EmbedRole.PASSAGE)
    similarities = (questions @ passages.T)[~np.eye(len(subjects), dtype=bool)]
    values = np.percentile(similarities, PERCENTS)
    return Calibration(
        pair_count=int(similarities.size),
        mean=float(similarities.mean()),
        deviation=float(similarities.std()),
        percents=PERCENTS,
        similarities=tuple(float(value) for value in values),
    )
