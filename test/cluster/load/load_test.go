package load

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

// Whoever does not answer is found out, and whoever does is not accused.
func TestFailuresAreCounted(t *testing.T) {
	page := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer page.Close()
	refused, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused.Close()
	echo, silent := listen(t, true), listen(t, false)

	l := Start(Targets{
		Stream: []string{refused.Addr().String()},
		HTTP:   []string{strings.TrimPrefix(page.URL, "http://")},
		UDP:    []string{echo, silent},
	})
	time.Sleep(udpPatience + time.Second)
	r := l.Stop()
	t.Log("\n" + r.String())
	if r.Stream.Asked < 10 || r.Stream.Resets != r.Stream.Asked || r.Stream.Failed != r.Stream.Asked {
		t.Errorf("a port that nobody listens on: %s", r.Stream)
	}
	if r.HTTP.Asked < 5 || r.HTTP.Failed != 0 {
		t.Errorf("a web server: %s", r.HTTP)
	}
	if r.UDP.Asked < 20 || r.UDP.Failed < 1 || r.UDP.Failed > 3 {
		t.Errorf("one server that echoes and one that is silent: %s", r.UDP)
	}
	if len(r.UDP.First) == 0 || !strings.Contains(r.UDP.First[0], silent) {
		t.Errorf("the silent server is not named: %q", r.UDP.First)
	}
}

// A connection that is closed under way is a failure, and the next message has a new
// one.
func TestClosedConnectionIsAFailure(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	go func() {
		first := true
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			if first {
				_, _ = io.CopyN(conn, conn, 40) // ten messages
				conn.Close()
				first = false
				continue
			}
			go func() { _, _ = io.Copy(conn, conn) }() // until the load ends
		}
	}()
	l := Start(Targets{Stream: []string{listener.Addr().String()}})
	time.Sleep(time.Second)
	if r := l.Stop(); r.Stream.Failed != 1 || r.Stream.Resets != 1 || r.Stream.Asked < 15 {
		t.Errorf("%s, %q, want one reset", r.Stream, r.Stream.First)
	}
}

// listen opens a UDP port that echoes, or does not.
func listen(t *testing.T, echo bool) string {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go func() {
		for buffer := make([]byte, 64); echo; {
			n, from, err := conn.ReadFrom(buffer)
			if err != nil {
				return
			}
			_, _ = conn.WriteTo(buffer[:n], from) // the load finds out
		}
	}()
	return conn.LocalAddr().String()
}
