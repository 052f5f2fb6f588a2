#compdef raftkv raftkv-kv raftkv-ctl
# Completion of raftkv, raftkv-kv and raftkv-ctl, made by `raftkv completion zsh`.

# What may follow the words that name a command: sets commands_, options_, words_ and values_.
_raftkv_row() {
    commands_=() options_=() words_=() values_=()
    case $1 in
# DATA
    esac
}

_raftkv() {
    local at=${words[1]:t} takes= kind= word i number=1
    local -a commands_ options_ words_ kinds
    local -A values_
    _raftkv_row $at
    for ((i = 2; i < CURRENT; i++)); do
        word=${words[i]}
        if [[ -n $takes ]]; then
            takes=
        elif [[ $word == -?* ]]; then
            (( ${+values_[$word]} )) && takes=$word
        elif [[ -n ${(M)commands_:#${(L)word}:*} ]]; then
            at="$at ${(L)word}"
            [[ $at == 'raftkv kv' || $at == 'raftkv ctl' ]] && at=${at/ /-}
            _raftkv_row $at
        else
            (( number++ ))
        fi
    done
    if [[ -z $takes && $PREFIX == --*=* ]]; then
        takes=${PREFIX%%=*}
        compset -P '*='
    fi
    if [[ -n $takes ]]; then
        kind=${values_[$takes]}
    elif [[ $PREFIX == -* ]]; then
        _describe -o option options_
        return
    elif (( $#commands_ )); then
        PREFIX=${(L)PREFIX}
        _describe command commands_
        return
    else
        kind=${words_[number]}
    fi
    case $kind in
    FILE) _files ;;
    DIR) _files -/ ;;
    @) compset -P @ && _files ;;
    *) kinds=(${=kind}) && compadd -a kinds ;;
    esac
}

if [[ $funcstack[1] == _raftkv ]]; then
    _raftkv "$@"
else
    compdef _raftkv raftkv raftkv-kv raftkv-ctl
fi
