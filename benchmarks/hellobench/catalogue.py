"""The workloads of HelloBench that can be the same software from Debian 12, and those held back: all of them, by name.

Languages are in `languages`, web servers and frameworks in `web`, the rest is here. Commands are those of the
original where it gives the container one; programs of its mounts are files in /app here, and its programs for
standard input are arguments. Servers listen on fixed ports of the loopback address, since containers share the
host's network.
"""

from __future__ import annotations

from benchmarks.hellobench import heldback, languages, web
from benchmarks.hellobench.steps import application, command, install
from benchmarks.hellobench.workloads import (
    DATABASE,
    DISTRO,
    OTHER,
    SCRATCH,
    Amqp,
    Http,
    Output,
    Redis,
    Sql,
    Workload,
)

HELLO_C = """\
/* hello-world: two system calls, no C library. */
static long call(long number, long a, long b, long c)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}

void _start(void)
{
    static const char text[] = "hello\\n";
    call(1, 1, (long)text, sizeof text - 1); /* write */
    call(60, 0, 0, 0);                       /* exit */
}
"""

# Nothing in /run: ctr mounts an empty tmpfs there.
POSTGRES_START = """\
#!/bin/sh
set -e
if ! [ -s "$PGDATA/PG_VERSION" ]; then
    initdb --auth=trust --username=postgres
fi
exec postgres -c port=21001 -c listen_addresses=127.0.0.1 -c unix_socket_directories=/tmp
"""

MARIADB_START = """\
#!/bin/sh
set -e
if ! [ -d /var/lib/mysql/mysql ]; then
    mariadb-install-db --user=mysql --datadir=/var/lib/mysql --skip-test-db --auth-root-authentication-method=normal
fi
exec mariadbd --user=mysql
"""

MARIADB_SETTINGS = """\
[mariadbd]
port = 21002
bind-address = 127.0.0.1
socket = /tmp/mysqld.sock
pid-file = /tmp/mysqld.pid
skip-name-resolve
"""

RABBITMQ_SETTINGS = """\
NODENAME=rabbit@localhost
NODE_IP_ADDRESS=127.0.0.1
NODE_PORT=21015
DIST_PORT=21016
"""

REGISTRY_SETTINGS = """\
version: 0.1
log: {level: info}
storage:
  filesystem: {rootdirectory: /var/lib/docker-registry}
http: {addr: "127.0.0.1:21017"}
"""

_WORKLOADS = (
    Workload("debian", DISTRO, Output("hello"), command("echo", "hello")),
    Workload(
        "busybox",
        DISTRO,
        Output("hello"),
        f"""{install("busybox-static")}
RUN mkdir -p /out/bin /out/tmp /out/root && cp /bin/busybox /out/bin && cd /out/bin \\
    && for applet in $(./busybox --list); do ln -f busybox $applet; done
FROM scratch
COPY --from=build /out /
ENV PATH=/bin
{command("echo", "hello")}""",
        base=SCRATCH,
    ),
    Workload(
        "hello-world",
        OTHER,
        Output("hello"),
        f"""{install("gcc", "libc6-dev")}
COPY hello.c /
RUN gcc -O2 -static -nostdlib -ffreestanding -fno-stack-protector \\
    -fcf-protection=none -Wl,--build-id=none -o /hello /hello.c
FROM scratch
COPY --from=build /hello /
{command("/hello")}""",
        base=SCRATCH,
        files={"hello.c": HELLO_C},
    ),
    Workload(
        "postgres",
        DATABASE,
        Sql(21001, "postgres"),
        f"""{install("postgresql-common")}
RUN sed -ri 's/#(create_main_cluster) .*$/\\1 = false/' /etc/postgresql-common/createcluster.conf
{install("postgresql-15")}
RUN install -d -o postgres -g postgres -m 3777 /var/run/postgresql \\
    && install -d -o postgres -g postgres -m 700 /var/lib/postgresql/data
ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/lib/postgresql/15/bin
ENV LANG=C.UTF-8 PGDATA=/var/lib/postgresql/data
LABEL org.opencontainers.image.title=postgres
USER postgres
EXPOSE 21001
STOPSIGNAL SIGINT
{application("start.sh")}
{command("sh", "/app/start.sh")}""",
        files={"start.sh": POSTGRES_START},
    ),
    Workload(
        "mariadb",
        DATABASE,
        Sql(21002, "mariadb"),
        f"""{install("mariadb-common")}
RUN apt-get install -y mariadb-server && rm -rf /var/lib/mysql \\
    && install -d -o mysql -g mysql -m 755 /var/lib/mysql /run/mysqld
COPY zz-port.cnf /etc/mysql/mariadb.conf.d/
LABEL org.opencontainers.image.title=mariadb
EXPOSE 21002
{application("start.sh")}
{command("sh", "/app/start.sh")}""",
        files={"start.sh": MARIADB_START, "zz-port.cnf": MARIADB_SETTINGS},
    ),
    Workload(
        "redis",
        DATABASE,
        Redis(21003),
        f"""{install("redis-tools")}
{install("redis-server")}
RUN install -d -o redis -g redis /data
LABEL org.opencontainers.image.title=redis
EXPOSE 21003
USER redis
WORKDIR /data
{command("redis-server", "--bind", "127.0.0.1", "--port", "21003")}""",
    ),
    Workload(
        "rabbitmq",
        OTHER,
        Amqp(21015),
        f"""{install("erlang-base", "erlang-crypto", "erlang-ssl", "erlang-inets", "erlang-mnesia")}
{install("rabbitmq-server")}
RUN rm -rf /var/lib/rabbitmq/mnesia /var/lib/rabbitmq/.erlang.cookie
COPY rabbitmq-env.conf /etc/rabbitmq/
ENV HOME=/var/lib/rabbitmq ERL_EPMD_PORT=21018 ERL_EPMD_ADDRESS=127.0.0.1
LABEL org.opencontainers.image.title=rabbitmq
USER rabbitmq
EXPOSE 21015
{command("/usr/lib/rabbitmq/bin/rabbitmq-server")}""",
        files={"rabbitmq-env.conf": RABBITMQ_SETTINGS},
        deadline_s=120.0,
    ),
    Workload(
        "registry",
        OTHER,
        Http(21017, "/v2/"),
        f"""{install("docker-registry")}
LABEL org.opencontainers.image.title=registry
EXPOSE 21017
{application("config.yml")}
{command("docker-registry", "serve", "/app/config.yml")}""",
        files={"config.yml": REGISTRY_SETTINGS},
    ),
)

# The small ones that many others share first, so that a build serves measurements early.
_FIRST = ("busybox", "hello-world", "debian", "python", "perl", "redis", "nginx", "postgres")
_ALL = {workload.name: workload for workload in (*_WORKLOADS, *web.WORKLOADS, *languages.WORKLOADS)}
WORKLOADS: dict[str, Workload] = {name: _ALL[name] for name in (*_FIRST, *(n for n in _ALL if n not in _FIRST))}
# Those and the held-back ones, which run only if they are asked for.
EVERY: dict[str, Workload] = WORKLOADS | {workload.name: workload for workload in heldback.WORKLOADS}

# One or two of each category, all of which start and are built quickly.
QUICK = ("busybox", "redis", "python", "gcc", "nginx", "django")
# Programs that load much; tomcat is one of the paper's, too.
HELD_BACK = ("science", "tomcat", "rstat")
