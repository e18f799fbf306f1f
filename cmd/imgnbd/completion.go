package main

import (
	"fmt"
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
	case "sandbox":
		return sandboxModes
	case "output":
		return []string{"human", "json"}
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
		"    case $prev in\n")
	seen := map[string]bool{}
	for _, name := range completable() {
		for _, o := range documentedOptions(name) {
			if c := choices(o.long); c != nil && !seen[o.long] {
				seen[o.long] = true
				pattern := "--" + o.long
				if o.short != "" {
					pattern = "-" + o.short + "|" + pattern
				}
				fmt.Fprintf(&b, "    %s) COMPREPLY=($(compgen -W '%s' -- \"$cur\")); return ;;\n", pattern, strings.Join(c, " "))
			}
		}
	}
	b.WriteString("    esac\n    case ${COMP_WORDS[1]} in\n")
	for _, name := range completable()[1:] {
		fmt.Fprintf(&b, "    %s) words='%s' ;;\n", name, words(name))
	}
	fmt.Fprintf(&b, "    *) words='%s' ;;\n    esac\n", words(""))
	fmt.Fprintf(&b, "    [[ ${COMP_WORDS[1]} == completion ]] && words+=' bash zsh fish'\n"+
		"    if [[ $cur == -* || ${COMP_WORDS[1]} == completion ]]; then\n"+
		"        COMPREPLY=($(compgen -W \"$words\" -- \"$cur\"))\n"+
		"    elif [[ $COMP_CWORD == 1 ]]; then\n"+
		"        COMPREPLY=($(compgen -W '%s' -- \"$cur\") $(compgen -f -- \"$cur\"))\n"+
		"    else\n"+
		"        COMPREPLY=($(compgen -f -- \"$cur\"))\n"+
		"    fi\n}\ncomplete -o filenames -F _imgnbd imgnbd\n", strings.Join(completable()[1:], " "))
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
	fmt.Fprintf(&b, "    esac\n    if (( CURRENT == 2 )); then compadd %s; fi\n"+
		"    [[ $words[2] == completion ]] && compadd bash zsh fish\n"+
		"    _arguments -s $options '*:file:_files'\n}\n_imgnbd \"$@\"\n", strings.Join(completable()[1:], " "))
	return b.String()
}

func fishCompletion() string {
	var b strings.Builder
	b.WriteString("# fish completion for imgnbd\n")
	sub := strings.Join(completable()[1:], " ")
	fmt.Fprintf(&b, "complete -c imgnbd -n __fish_use_subcommand -a '%s'\n", sub)
	b.WriteString("complete -c imgnbd -n '__fish_seen_subcommand_from completion' -f -a 'bash zsh fish'\n")
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
