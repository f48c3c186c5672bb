# shellcheck shell=sh
# Sourced by the other scripts: quoting for another shell, and errors of one line.

# The arguments as one line that a shell reads back word for word.
quoted() {
    quoted_line=
    for quoted_word in "$@"; do
        case $quoted_word in
            '' | *[!A-Za-z0-9_./:=,@%+-]*)
                # The x keeps a last newline.
                quoted_word=$(printf '%sx' "$quoted_word" | sed "s/'/'\\\\''/g")
                quoted_word="'${quoted_word%x}'"
                ;;
        esac
        quoted_line="$quoted_line${quoted_line:+ }$quoted_word"
    done
    printf '%s\n' "$quoted_line"
}

complain() {
    printf 'error: %s\n' "$*" >&2
}

fail() {
    complain "$@"
    exit 2
}

# The comment at the head of the script that is named.
usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"
}
