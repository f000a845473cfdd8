package flannel

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// maxEnvFile is the size of a file of assignments in bytes. Flannel writes 200.
const maxEnvFile = 64 << 10

// assignment is the name and the equals sign before a value.
var assignment = regexp.MustCompile(`^(?:export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)=`)

// ParseEnvFile reads a file of assignments, as a shell sources it and systemd's
// EnvironmentFile= takes it: NAME=value, one a line, with quotes, backslashes,
// comments and "export" as in a shell. A name that comes again has its last
// value. Nothing is run or expanded: a line that a shell would have to is a
// fault. Sound lines are returned beside the error.
func ParseEnvFile(data []byte) (map[string]string, error) {
	if len(data) > maxEnvFile {
		return nil, fmt.Errorf("the file has %d bytes; the limit is %d", len(data), maxEnvFile)
	}
	values := map[string]string{}
	var f faults
	number := 0
	for line := range bytes.Lines(data) {
		number++
		text := strings.Trim(string(line), " \t\r\n")
		if text == "" || text[0] == '#' {
			continue
		}
		name, value, err := parseAssignment(text)
		if err != nil {
			f.add("line %d: %s: %w", number, quote(text), err)
			continue
		}
		values[name] = value
	}
	return values, f.err()
}

// Errors of a line.
var (
	errNoAssignment = errors.New("not of the form NAME=value")
	errNotPlain     = errors.New("only plain values are read; nothing is run or expanded")
	errQuote        = errors.New("a quote is not closed, or a backslash ends the line")
	errMoreWords    = errors.New("one assignment a line; put a value with spaces in quotes")
)

// parseAssignment reads one line.
func parseAssignment(text string) (name, value string, err error) {
	m := assignment.FindStringSubmatch(text)
	if m == nil {
		return "", "", errNoAssignment
	}
	value, rest, err := parseWord(text[len(m[0]):])
	if err != nil {
		return "", "", err
	}
	if rest = strings.TrimLeft(rest, " \t"); rest != "" && rest[0] != '#' {
		return "", "", errMoreWords
	}
	return m[1], value, nil
}

// parseWord reads one word of a shell, up to a blank, and returns what it means
// and what follows.
func parseWord(text string) (value, rest string, err error) {
	var b strings.Builder
	var quote byte // 0 outside quotes
	for i := 0; i < len(text); i++ {
		c := text[i]
		switch {
		case c < ' ' && c != '\t' || c == 0x7f:
			return "", "", errNotPlain
		case quote != 0 && c == quote:
			quote = 0
		case quote == '\'':
			b.WriteByte(c)
		case c == '$' || c == '`':
			return "", "", errNotPlain
		case c == '\\':
			i++
			if i == len(text) {
				return "", "", errQuote
			}
			if quote == '"' && !strings.ContainsRune("$`\"\\", rune(text[i])) {
				b.WriteByte('\\') // a backslash like any other
			}
			b.WriteByte(text[i])
		case quote == '"':
			b.WriteByte(c)
		case c == '\'' || c == '"':
			quote = c
		case c == ' ' || c == '\t':
			return b.String(), text[i:], nil
		case strings.IndexByte(";&|<>(){~", c) >= 0:
			return "", "", errNotPlain
		default:
			b.WriteByte(c)
		}
	}
	if quote != 0 {
		return "", "", errQuote
	}
	return b.String(), "", nil
}
