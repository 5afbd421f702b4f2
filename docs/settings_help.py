"""An extension of griffe: a config's settings as the Attributes of its docstring, from the help that they carry."""

import ast

import griffe


class SettingsHelp(griffe.Extension):
    """Adds `name: help` of each `field(default=..., metadata={"help": ...})` of a class."""

    def on_class_instance(self, *, node, cls, agent, **kwargs):
        lines = []
        for statement in node.body if isinstance(node, ast.ClassDef) else ():
            call = statement.value if isinstance(statement, ast.AnnAssign) else None
            if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "field"):
                continue
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            metadata = given.get("metadata")
            if not (isinstance(metadata, ast.Dict) and [key.value for key in metadata.keys] == ["help"]):
                continue
            if not isinstance(metadata.values[0], ast.Constant):  # made when it is run
                continue
            text = " ".join(ast.literal_eval(metadata.values[0]).split())
            default = f" Default: `{ast.unparse(given['default'])}`." if "default" in given else ""
            lines.append(f"    {statement.target.id}: {text}{default}")
        if lines and cls.docstring:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)
