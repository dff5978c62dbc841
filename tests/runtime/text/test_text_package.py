import subprocess
import sys

import qwen_runtime.text as package


def test_all_is_sorted_by_kind_and_complete():
    public = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "").startswith(package.__name__)
    }
    assert public | {"ChatEvent"} == set(package.__all__)
    assert len(package.__all__) == len(set(package.__all__))
    constants_last = sorted(package.__all__, key=lambda name: (name[0].islower(), name))
    assert package.__all__ == constants_last


def test_import_leaves_jinja_for_the_first_template():
    script = (
        "import sys, qwen_runtime.text as text\n"
        "assert 'jinja2' not in sys.modules\n"
        "assert not {'torch', 'transformers', 'onnx', 'qwen_export'} & set(sys.modules)\n"
        "assert text.ChatTemplate('{{ messages[0].content }}')"
        ".render([{'role': 'user', 'content': 'hi'}]) == 'hi'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
