"""The workloads of HelloBench that are web servers and web frameworks."""

from __future__ import annotations

from benchmarks.hellobench.steps import JAVA_RUNTIME, application, command, install, shell
from benchmarks.hellobench.workloads import BUILDPACK, WEB_FRAMEWORK, WEB_SERVER, Http, Output, Workload

NGINX_SITE = """\
server {
    listen 127.0.0.1:21010;
    root /app;
}
"""

# start.jar is a symbolic link, beside which it would look for its modules.
JETTY_START = (
    "exec java -Djetty.home=$JETTY_HOME -jar $JETTY_HOME/start.jar"
    " jetty.http.host=127.0.0.1 jetty.http.port=21013 --module=http,deploy"
)

PAGE = "<!DOCTYPE html><title>hello</title><p>hello\n"

NODEJS = f"""{install("nodejs")}
LABEL org.opencontainers.image.title=nodejs
EXPOSE 21014
{application("index.js")}
{command("node", "/app/index.js")}"""
NODEJS_FILES = {
    "index.js": """\
const http = require("http");
http.createServer((request, response) => response.end("hello\\n")).listen(21014, "127.0.0.1");
"""
}

WORKLOADS = (
    Workload(
        "nginx",
        WEB_SERVER,
        Http(21010),
        f"""{install("nginx")}
RUN rm /etc/nginx/sites-enabled/default
COPY site.conf /etc/nginx/conf.d/
LABEL org.opencontainers.image.title=nginx
EXPOSE 21010
STOPSIGNAL SIGQUIT
{application("index.html")}
{command("nginx", "-g", "daemon off;")}""",
        files={"site.conf": NGINX_SITE, "index.html": PAGE},
    ),
    Workload(
        "httpd",
        WEB_SERVER,
        Http(21011),
        f"""{install("apache2")}
RUN echo 'Listen 127.0.0.1:21011' >/etc/apache2/ports.conf \\
    && sed -i 's/\\*:80>/*:21011>/; s,DocumentRoot .*,DocumentRoot /app,' \\
        /etc/apache2/sites-available/000-default.conf \\
    && sed -i 's,<Directory /var/www/>,<Directory /app/>,' /etc/apache2/apache2.conf \\
    && echo 'ServerName localhost' >/etc/apache2/conf-enabled/name.conf
LABEL org.opencontainers.image.title=httpd
EXPOSE 21011
STOPSIGNAL SIGWINCH
{application("index.html")}
{shell(". /etc/apache2/envvars && mkdir -p $APACHE_RUN_DIR && exec apache2 -D FOREGROUND")}""",
        files={"index.html": PAGE},
    ),
    Workload(
        "tomcat",
        WEB_SERVER,
        Http(21012),
        f"""{JAVA_RUNTIME}
{install("tomcat10")}
RUN sed -i 's/port="8080"/port="21012" address="127.0.0.1"/' /etc/tomcat10/server.xml \\
    && rm -rf /var/lib/tomcat10/webapps/ROOT && mkdir -p /app/ROOT && ln -s /app/ROOT /var/lib/tomcat10/webapps/ROOT
ENV CATALINA_HOME=/usr/share/tomcat10 CATALINA_BASE=/var/lib/tomcat10 CATALINA_TMPDIR=/tmp
ENV JAVA_HOME=/usr/lib/jvm/java-17-openjdk-amd64
LABEL org.opencontainers.image.title=tomcat
USER tomcat
EXPOSE 21012
COPY index.html /app/ROOT/
{command("/usr/share/tomcat10/bin/catalina.sh", "run")}""",
        files={"index.html": PAGE},
        deadline_s=120.0,
    ),
    Workload(
        "jetty",
        WEB_SERVER,
        Http(21013),
        f"""{JAVA_RUNTIME}
{install("jetty9")}
ENV JETTY_HOME=/usr/share/jetty9 JETTY_BASE=/app
LABEL org.opencontainers.image.title=jetty
EXPOSE 21013
COPY index.html /app/webapps/root/
WORKDIR /app
{shell(JETTY_START)}""",
        files={"index.html": PAGE},
        deadline_s=120.0,
    ),
    Workload(
        "nodejs",
        WEB_FRAMEWORK,
        Http(21014),
        NODEJS,
        files=NODEJS_FILES,
    ),
    Workload(
        "nodejs-fat",
        WEB_FRAMEWORK,
        Http(21014),
        NODEJS,
        base=BUILDPACK,
        files=NODEJS_FILES,
    ),
    Workload(
        "django",
        WEB_FRAMEWORK,
        Output("manage.py"),
        f"""{install("python3")}
{install("python3-django")}
LABEL org.opencontainers.image.title=django
WORKDIR /app
{shell("django-admin startproject hello && ls hello")}""",
    ),
    Workload(
        "rails",
        WEB_FRAMEWORK,
        Output("application_record.rb"),
        f"""{install("ruby")}
{install("rails")}
LABEL org.opencontainers.image.title=rails
WORKDIR /app
{command("rails", "new", "hello", "--skip-bundle", "--skip-javascript", "--skip-webpack-install", "--skip-git")}""",
    ),
)
