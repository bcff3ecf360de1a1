start:
    ./hitl up

stop:
    ./hitl down

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

deploy:
    ./hitl up
