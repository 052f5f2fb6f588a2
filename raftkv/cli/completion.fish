# Completion of raftkv, raftkv-kv and raftkv-ctl, made by `raftkv completion fish`.

# The command that the words so far name, and how many words stand after it.
function __raftkv_at
    set -l typed (commandline -opc)
    set -l at (string replace -r '.*/' '' -- $typed[1])
    set -l takes
    set -l number 0
    for word in $typed[2..-1]
        set -l next "$at "(string lower -- $word)
        if set -q takes[1]
            set takes
        else if string match -q -- '-?*' $word
            contains -- $word $__raftkv_takes; and set takes $word
        else if contains -- $next $__raftkv_paths
            set at (string replace -r '^raftkv (kv|ctl)$' 'raftkv-$1' -- $next)
        else
            set number (math $number + 1)
        end
    end
    echo $at
    echo $number
end

# Whether they name this command, with so many words after it if that is asked.
function __raftkv_is
    set -l found (__raftkv_at)
    test "$found[1]" = "$argv[1]"; and begin
        not set -q argv[2]; or test "$found[2]" = "$argv[2]"
    end
end

# The files of a value that begins with @.
function __raftkv_value_files
    set -l token (commandline -ct)
    string match -q -- '@*' $token; or return
    for name in (__fish_complete_path (string sub -s 2 -- $token))
        echo "@$name"
    end
end

complete -c raftkv -c raftkv-kv -c raftkv-ctl -f
# DATA
