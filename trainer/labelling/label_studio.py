"""Writes Label Studio's tasks (https://labelstud.io/guide/task_format), to go on there.

Images are addressed as files of a local storage whose folder is that of the photographs
(LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT). The labelling interface is

    <View><Image name="image" value="$image"/>
    <TextArea name="caption" toName="image" maxSubmissions="1"/></View>
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from trainer.labelling.answers import Answer
from trainer.labelling.session import Session

_LOCAL_FILES = "/data/local-files/?d="


def export_label_studio(path: Path, session: Session) -> None:
    """Writes a task for each photograph: answers as annotations, what models said as predictions.

    Answers about images that are not among the photographs come last.
    """
    names = [photo.name for photo in session.photos]
    others = [one.image for one in session.answers.all() if one.image not in set(names)]
    tasks = []
    for number, name in enumerate([*names, *others]):
        answer = session.answers.last(name)
        proposals = session.proposals.of(number) if number < len(names) else []
        tasks.append(
            {
                "id": number + 1,
                "data": {"image": _LOCAL_FILES + quote(name)},
                "annotations": [_annotation(answer)] if answer and answer.action != "clear" else [],
                "predictions": [{"result": _result(proposals)}] if proposals else [],
            }
        )
    temporary = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(tasks, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _annotation(answer: Answer) -> dict[str, Any]:
    return {
        "result": _result(answer.captions),
        "was_cancelled": not answer.captions,
        "lead_time": answer.seconds,
        "created_at": answer.when,
    }


def _result(texts: Sequence[str]) -> list[dict[str, Any]]:
    if not texts:
        return []
    value = {"text": list(texts)}
    named = {"from_name": "caption", "to_name": "image", "type": "textarea"}
    return [{**named, "value": value}]
