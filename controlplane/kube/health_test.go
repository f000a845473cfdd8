package kube

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestAwaySaysTheSameAsLongAsTheAPIDoes(t *testing.T) {
	refused := func(port int, remote string) error {
		return &url.Error{Op: "Get", URL: fmt.Sprintf("https://192.0.2.1:6443/api/v1/nodes?timeoutSeconds=%d", port), Err: &net.OpError{
			Op: "read", Net: "tcp", Source: &net.TCPAddr{IP: net.IPv4(192, 0, 2, 7), Port: port}, Addr: &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 6443},
			Err: os.NewSyscallError(remote, syscall.ECONNRESET),
		}}
	}
	nudges := 0
	a := &answers{host: "https://192.0.2.1:6443", nudge: func() { nudges++ }}
	a.Note(nil)
	a.Note(refused(40001, "read"))
	first := a.Away()
	a.Note(refused(40002, "read"))
	if second := a.Away(); nudges != 1 || first.Error() != second.Error() || second.Since != first.Since {
		t.Errorf("%d nudges: %v, then %v", nudges, first, second)
	}
	if text := first.Error(); !strings.Contains(text, "192.0.2.1:6443: read: connection reset by peer") || !strings.Contains(text, first.Since.UTC().Format(time.RFC3339)) || !errors.Is(first, syscall.ECONNRESET) {
		t.Errorf("it says %s", text)
	}
	a.Note(errors.New("Unauthorized"))
	if nudges != 2 || a.Away().Since != first.Since {
		t.Errorf("%d nudges, away since %v", nudges, a.Away().Since)
	}
	a.Note(nil)
	if nudges != 3 || a.Away() != nil {
		t.Errorf("%d nudges, away is %v", nudges, a.Away())
	}
	if text := plain(errors.New("one\ntwo" + strings.Repeat("x", 1000))); strings.Contains(text, "\n") || len(text) > 310 {
		t.Errorf("a long text becomes %s", text)
	}
}

func TestNodesThatAreLeftOutAreLoggedOnce(t *testing.T) {
	var text bytes.Buffer
	l := newLeftOut(slog.New(slog.NewTextHandler(&text, nil)))
	for range 3 {
		l.Note(map[string]string{"a": "one", "b": "two"})
	}
	l.Note(map[string]string{"a": "three"})
	l.Note(nil)
	if n := strings.Count(text.String(), "\n"); n != 5 {
		t.Errorf("%d lines:\n%s", n, &text)
	}
	for i := range 1000 {
		l.Note(map[string]string{"a": fmt.Sprint(i)})
	}
	if n := strings.Count(text.String(), "\n"); n > linesAtOnce+1 {
		t.Errorf("%d lines", n)
	}
}
