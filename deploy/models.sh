#!/bin/sh
# outrider-models fetch: fetch the models that the services' settings name, and say so in a file.
# outrider-models wait:  wait until that has happened, for workers that have no way out themselves.
set -eu

marker() {
  echo "$OUTRIDER_CACHE/fetched/$(printf %s "$1" | sha256sum | cut -c1-32)"
}

fetch() {
  outrider fetch "$1"
  mkdir -p "$OUTRIDER_CACHE/fetched"
  touch "$(marker "$1")"
}

wait_for() {
  until [ -e "$(marker "$1")" ]; do
    echo "waiting for model '$1'"
    sleep 5
  done
}

case "${1:-}" in
  fetch) act=fetch ;;
  wait) act=wait_for ;;
  *) echo 'usage: outrider-models fetch|wait' >&2; exit 2 ;;
esac
for model in "${OUTRIDER_VERIFIER_MODEL:-}" "${OUTRIDER_DRAFTER_MODEL:-}"; do
  case "$model" in
    # Nothing to fetch: none, made up, or a folder.
    '' | random:* | synthetic:* | /* | .*) ;;
    *) "$act" "$model" ;;
  esac
done
