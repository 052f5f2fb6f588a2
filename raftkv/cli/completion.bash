# Completion of raftkv, raftkv-kv and raftkv-ctl, made by `raftkv completion bash`. Needs bash 4 or newer.

# What may follow the words that name a command: sets commands, options, words and values.
_raftkv_row() {
    commands= options= words=() values=()
    case $1 in
# DATA
    esac
}

_raftkv() {
    local at=${COMP_WORDS[0]##*/} cur=${COMP_WORDS[COMP_CWORD]} takes= kind= number=0 word i
    local commands options words
    local -A values
    _raftkv_row "$at"
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if [[ $word == = ]]; then # readline breaks words at these
            continue
        elif [[ $word == : ]]; then
            ((i++))
        elif [[ $takes ]]; then
            takes=
        elif [[ $word == -?* ]]; then
            [[ -v "values[$word]" ]] && takes=$word
        elif [[ $word != @ && " $commands " == *" ${word,,} "* ]]; then
            at="$at ${word,,}"
            [[ $at == 'raftkv kv' || $at == 'raftkv ctl' ]] && at=${at/ /-}
            _raftkv_row "$at"
        elif [[ $word != @ ]]; then
            ((number++))
        fi
    done
    [[ $cur == = ]] && cur=
    if [[ $takes ]]; then
        kind=${values[$takes]}
    elif [[ $cur == -* ]]; then
        kind=$options
    elif [[ $commands ]]; then
        kind=$commands cur=${cur,,}
    else
        kind=${words[number]}
    fi
    COMPREPLY=()
    case $kind in
    FILE) compopt -o default ;;
    DIR) compopt -o dirnames ;;
    @) # COMP_WORDS are broken at these, what is replaced isn't
        cur=${cur#@}
        [[ $cur != "${COMP_WORDS[COMP_CWORD]}" || ${COMP_WORDS[COMP_CWORD - 1]} == @ ]] &&
            mapfile -t COMPREPLY < <(compgen -P @ -f -- "$cur")
        ;;
    *) mapfile -t COMPREPLY < <(compgen -W "$kind" -- "$cur") ;;
    esac
}

complete -F _raftkv raftkv raftkv-kv raftkv-ctl
