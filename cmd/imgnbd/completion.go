package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// completionCommand prints scripts made from the tables that the program
// itself uses, so that they cannot be out of date.
func completionCommand() *command {
	c := newCommand("completion")
	c.run = func(u *ui, operands []string) error {
		shell, err := one(operands, "shell")
		if err != nil {
			return err
		}
		shells := map[string]func() string{"bash": bashCompletion, "zsh": zshCompletion, "fish": fishCompletion}
		script, ok := shells[shell]
		if !ok {
			return usageError("shell '%s' is none of bash, zsh, fish", shell)
		}
		u.printf("%s", script())
		return nil
	}
	return c
}

// completable returns the names of all commands, the bare one first.
func completable() []string {
	names := []string{""}
	for _, c := range commands() {
		names = append(names, c.name)
	}
	return names
}

// choices are the values of options that have few.
func choices(option string) []string {
	switch option {
	case "format":
		return []string{"raw", "qcow2"}
	case "cache":
		return []string{"none", "writeback", "writethrough", "directsync", "unsafe"}
	case "aio":
		return []string{"threads", "native"}
	case "discard":
		return []string{"ignore", "unmap"}
	case "detect-zeroes":
		return []string{"off", "on", "unmap"}
	case "backing":
		return backingPolicies
	case "backing-format":
		return []string{"raw", "qcow2"}
	case "repair":
		return []string{"leaks", "all"}
	case "tls-mode":
		return slices.Sorted(maps.Keys(tlsModes))
	case "sandbox":
		return sandboxModes
	case "output":
		return []string{"human", "json"}
	}
	return nil
}

// operands are what a command takes in place of files; nil: it takes files.
func operands(command string) []string {
	switch command {
	case "completion":
		return []string{"bash", "zsh", "fish"}
	case "help":
		return completable()[1:]
	}
	return nil
}

func words(command string) string {
	var list []string
	for _, o := range documentedOptions(command) {
		if o.short != "" {
			list = append(list, "-"+o.short)
		}
		list = append(list, "--"+o.long)
	}
	return strings.Join(list, " ")
}

func bashCompletion() string {
	var b strings.Builder
	b.WriteString("# bash completion for imgnbd\n_imgnbd() {\n" +
		"    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} words\n" +
		"    [[ $prev == = ]] && prev=${COMP_WORDS[COMP_CWORD-2]}\n" +
		"    [[ $cur == = ]] && cur=\n" +
		"    local values= operands=\n    case ${COMP_WORDS[1]} in\n")
	names := completable()
	for _, name := range append(names[1:], "") { // the bare command is "anything else"
		pattern := name
		if name == "" {
			pattern = "*"
		}
		fmt.Fprintf(&b, "    %s)\n        words='%s' operands='%s'\n        case $prev in\n", pattern, words(name), strings.Join(operands(name), " "))
		for _, o := range documentedOptions(name) {
			if c := choices(o.long); c != nil {
				option := "--" + o.long
				if o.short != "" {
					option = "-" + o.short + "|" + option
				}
				fmt.Fprintf(&b, "        %s) values='%s' ;;\n", option, strings.Join(c, " "))
			}
		}
		b.WriteString("        esac ;;\n")
	}
	// Names of files are taken a line at a time: they may have blanks.
	fmt.Fprintf(&b, "    esac\n"+
		"    if [[ $values ]]; then\n"+
		"        COMPREPLY=($(compgen -W \"$values\" -- \"$cur\"))\n"+
		"    elif [[ $cur == -* ]]; then\n"+
		"        COMPREPLY=($(compgen -W \"$words\" -- \"$cur\"))\n"+
		"    elif [[ $COMP_CWORD == 1 ]]; then\n"+
		"        mapfile -t COMPREPLY < <(compgen -W '%s' -- \"$cur\"; compgen -f -- \"$cur\")\n"+
		"    elif [[ $operands ]]; then\n"+
		"        COMPREPLY=($(compgen -W \"$operands\" -- \"$cur\"))\n"+
		"    else\n"+
		"        mapfile -t COMPREPLY < <(compgen -f -- \"$cur\")\n"+
		"    fi\n}\ncomplete -o filenames -F _imgnbd imgnbd\n", strings.Join(names[1:], " "))
	return b.String()
}

func zshCompletion() string {
	var b strings.Builder
	b.WriteString("#compdef imgnbd\n_imgnbd() {\n    local -a options\n    case $words[2] in\n")
	names := completable()
	slices.Reverse(names) // the bare command is "anything else"
	for _, name := range names {
		pattern := name
		if name == "" {
			pattern = "*"
		}
		fmt.Fprintf(&b, "    (%s) options=(\n", pattern)
		for _, o := range documentedOptions(name) {
			text := strings.NewReplacer("'", "", "[", "(", "]", ")", ":", " -").Replace(o.text)
			value := ""
			if c := choices(o.long); c != nil {
				value = fmt.Sprintf(":%s:(%s)", strings.ToLower(o.arg), strings.Join(c, " "))
			} else if o.arg != "" {
				value = fmt.Sprintf(":%s:_files", strings.ToLower(o.arg))
			}
			eq := ""
			if o.arg != "" {
				eq = "="
			}
			fmt.Fprintf(&b, "        '--%s%s[%s]%s'\n", o.long, eq, text, value)
			if o.short != "" {
				fmt.Fprintf(&b, "        '-%s[%s]%s'\n", o.short, text, value)
			}
		}
		b.WriteString("    ) ;;\n")
	}
	fmt.Fprintf(&b, "    esac\n    if (( CURRENT == 2 )); then compadd %s; fi\n", strings.Join(completable()[1:], " "))
	for _, name := range completable() {
		if list := operands(name); list != nil {
			fmt.Fprintf(&b, "    if [[ $words[2] == %s && CURRENT -eq 3 ]]; then compadd %s; return; fi\n", name, strings.Join(list, " "))
		}
	}
	// Found in $fpath, the file is the function; otherwise it says what it is for.
	b.WriteString("    _arguments -s $options '*:file:_files'\n}\n" +
		"if [[ $funcstack[1] == _imgnbd ]]; then\n    _imgnbd \"$@\"\nelse\n    compdef _imgnbd imgnbd\nfi\n")
	return b.String()
}

func fishCompletion() string {
	var b strings.Builder
	b.WriteString("# fish completion for imgnbd\n")
	sub := strings.Join(completable()[1:], " ")
	fmt.Fprintf(&b, "complete -c imgnbd -n __fish_use_subcommand -a '%s'\n", sub)
	for _, name := range completable() {
		if list := operands(name); list != nil {
			fmt.Fprintf(&b, "complete -c imgnbd -n '__fish_seen_subcommand_from %s' -f -a '%s'\n", name, strings.Join(list, " "))
		}
	}
	for _, name := range completable() {
		when := "__fish_use_subcommand"
		if name == "" {
			when = "not __fish_seen_subcommand_from " + sub
		} else {
			when = "__fish_seen_subcommand_from " + name
		}
		for _, o := range documentedOptions(name) {
			fmt.Fprintf(&b, "complete -c imgnbd -n '%s' -l %s", when, o.long)
			if o.short != "" {
				fmt.Fprintf(&b, " -s %s", o.short)
			}
			switch c := choices(o.long); {
			case c != nil:
				fmt.Fprintf(&b, " -x -a '%s'", strings.Join(c, " "))
			case o.arg != "":
				b.WriteString(" -r")
			}
			fmt.Fprintf(&b, " -d '%s'\n", strings.ReplaceAll(o.text, "'", ""))
		}
	}
	return b.String()
}
