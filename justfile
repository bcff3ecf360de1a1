# Lists the recipes.
default:
    @just --list

# start and stop, on a Mac with a VM profile: the VM and all in it.
start:
    ./hitl {{ if path_exists("profiles/vm.env") == "true" { "vm start" } else { "up" } }}

stop:
    ./hitl {{ if path_exists("profiles/vm.env") == "true" { "vm stop" } else { "down" } }}

status:
    ./hitl status

test *args:
    ./hitl test {{args}}

clean:
    ./hitl clean

check:
    ./hitl check

demo *args:
    ./hitl demo {{args}}

deploy *args:
    ./hitl deploy {{args}}
