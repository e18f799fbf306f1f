package main

import (
	"regexp"
	"strings"

	"github.com/imgnbd/imgnbd/docs"
)

// synopsis returns a section of docs/synopsis.txt, "" if there is none.
func synopsis(section string) string {
	_, text, ok := strings.Cut("\n"+docs.Synopsis, "\n== "+section+"\n")
	if !ok {
		return ""
	}
	text, _, _ = strings.Cut(text, "\n== ")
	return strings.TrimRight(text, "\n") + "\n"
}

// synopsisOf returns what is written about a command. To those who called
// the program qemu-nbd there is only one.
func synopsisOf(name string, compat bool) string {
	switch {
	case name != "":
		return synopsis(name)
	case compat:
		return synopsis("serve")
	}
	return synopsis("serve") + "\n" + synopsis("own")
}

// help prints what is written about a command.
func (u *ui) help(name string) error {
	u.printf("%s", strings.ReplaceAll(synopsisOf(name, u.compat()), "PROGRAM", u.called))
	return nil
}

func helpCommand() *command {
	c := newCommand("help")
	c.run = func(u *ui, operands []string) error {
		if len(operands) == 0 {
			return u.help("")
		}
		name, err := one(operands, "command")
		if err != nil {
			return err
		}
		if synopsis(name) == "" || findCommand(name) == nil {
			u.command = "" // whose help lists those there are
			return usageError("there is no command '%s'", name)
		}
		return u.help(name)
	}
	return c
}

// A documented option, as the synopsis has it.
type documented struct {
	short, long, arg string
	text             string // the first line
}

// documentedOptions reads the options of a command out of the synopsis.
func documentedOptions(name string) []documented {
	optionLine := regexp.MustCompile(`(?m)^  (?:-(\w), |    )--([a-z-]+)(?:=(\S+))? +(\S.*)$`)
	var list []documented
	for _, m := range optionLine.FindAllStringSubmatch(synopsisOf(name, false), -1) {
		list = append(list, documented{m[1], m[2], m[3], m[4]})
	}
	return list
}
