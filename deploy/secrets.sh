#!/usr/bin/env bash
# Make what guards a run beyond loopback, where there is no authority of your own yet:
#   deploy/secrets.sh FOLDER [DAYS]
# writes tokens (join, admin) and a certificate with its key (headrace.pem, headrace.key) for one
# name, `headrace`, that controller and workers share: `tls.server_name: headrace` in the run file,
# HEADRACE_SERVER_NAME=headrace for who calls. What is there already is left as it is.
set -euo pipefail

folder=${1:?usage: deploy/secrets.sh FOLDER [DAYS]}
days=${2:-30}
umask 077
mkdir -p "$folder"
for token in join admin; do
  [ -s "$folder/$token" ] || openssl rand -hex 32 >"$folder/$token"
done
if [ ! -s "$folder/headrace.pem" ]; then
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days "$days" \
    -subj /CN=headrace -addext subjectAltName=DNS:headrace \
    -keyout "$folder/headrace.key" -out "$folder/headrace.pem" 2>/dev/null
fi
ls -l "$folder"
