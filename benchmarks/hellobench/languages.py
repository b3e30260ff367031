"""The workloads of HelloBench that are languages: each prints hello, some after compiling it.

The "-fat" ones are the same on compilers and headers, as the images on Docker Hub are.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.hellobench.steps import application, command, install, shell
from benchmarks.hellobench.workloads import BUILDPACK, LANGUAGE, MINBASE, Output, Workload


def _language(
    name: str,
    packages: str,
    start: str,
    *,
    text: str = "hello",
    files: Mapping[str, str] | None = None,
    settings: str = "",
    base: str = MINBASE,
) -> Workload:
    """`packages`: one line for each layer. `settings`: lines with environment variables."""
    steps = [install(line) for line in packages.splitlines()]
    steps += ["ENV LANG=C.UTF-8", f"LABEL org.opencontainers.image.title={name}", *settings.splitlines()]
    steps += [application(*files) if files else "WORKDIR /app", start]
    return Workload(name, LANGUAGE, Output(text), "\n".join(steps), base=base, files=files or {}, deadline_s=120.0)


_GOLANG_FILES = {"main.go": 'package main\n\nimport "fmt"\n\nfunc main() {\n\tfmt.Println("hello")\n}\n'}
_GOLANG_SETTINGS = "ENV GOPATH=/go GOCACHE=/root/.cache/go-build GO111MODULE=off GOFLAGS=-mod=mod GOPROXY=off"
_JAVA_FILES = {
    "Main.java": """\
public class Main {
    public static void main(String[] arguments) {
        System.out.println("hello");
    }
}
"""
}
_MONO_FILES = {
    "main.cs": 'class Hello {\n    static void Main() {\n        System.Console.WriteLine("hello");\n    }\n}\n'
}
_GCC_FILES = {"main.c": '#include <stdio.h>\n\nint main(void)\n{\n    puts("hello");\n    return 0;\n}\n'}
_THRIFT_FILES = {"hello.idl": "service Hello {\n    string greet(1: string name)\n}\n"}

_PYTHON = command("python3", "-c", 'print("hello")')
_RUBY = command("ruby", "-e", 'puts "hello"')
_GO = shell("go run main.go")
_JAVA = shell("javac Main.java && java Main")

WORKLOADS = (
    _language("python", "libpython3-stdlib\npython3", _PYTHON),
    _language("perl", "perl", command("perl", "-e", 'print("hello\\n")')),
    _language("php", "php-common\nphp-cli", command("php", "-r", 'echo "hello\\n";')),
    _language("ruby", "ruby", _RUBY),
    _language("pypy", "pypy3-lib\npypy3", command("pypy3", "-c", 'print("hello")')),
    _language("gcc", "libc6-dev\ngcc", shell("gcc main.c && ./a.out"), files=_GCC_FILES),
    _language("golang", "golang-src\ngolang-go", _GO, files=_GOLANG_FILES, settings=_GOLANG_SETTINGS),
    _language("java", "openjdk-17-jre-headless\nopenjdk-17-jdk-headless", _JAVA, files=_JAVA_FILES),
    _language("mono", "mono-runtime\nmono-mcs", shell("mcs main.cs && mono main.exe"), files=_MONO_FILES),
    _language("thrift", "thrift-compiler", shell("thrift --gen py hello.idl && ls gen-py"), files=_THRIFT_FILES),
    _language(
        "r-base",
        "r-base-core\nr-base",
        command("R", "--no-save", "-e", 'sprintf("hello")'),
        text='[1] "hello"',  # R prints its input, too
    ),
    _language("rakudo", "moarvm nqp\nrakudo", command("raku", "-e", 'print("hello\\n")')),
    _language("jruby", "openjdk-17-jre-headless\njruby", command("jruby", "-e", 'puts "hello"')),
    _language("haskell", "libc6-dev gcc\nghc", command("ghc", "-e", '"hello"')),
    _language("python-fat", "libpython3-stdlib\npython3", _PYTHON, base=BUILDPACK),
    _language("ruby-fat", "ruby", _RUBY, base=BUILDPACK),
    _language(
        "golang-fat", "golang-src\ngolang-go", _GO, files=_GOLANG_FILES, settings=_GOLANG_SETTINGS, base=BUILDPACK
    ),
    _language("java-fat", "openjdk-17-jre-headless\nopenjdk-17-jdk-headless", _JAVA, files=_JAVA_FILES, base=BUILDPACK),
)
