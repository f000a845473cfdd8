// Command pod is what containers of the cluster run: with no argument it sleeps, as
// a pod's first container does; `pod serve` answers, and asks on behalf of a test.
//
//	TCP 8080  HTTP: /who, /fetch, /udp, /stream
//	UDP 8081  echo
//	TCP 8082  echo
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == "serve" {
		fatal(serve())
	}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGINT, syscall.SIGTERM)
	<-ended
}

// timeout is for one question that a test asks.
const timeout = 3 * time.Second

func serve() error {
	datagrams, err := net.ListenPacket("udp", ":8081")
	if err != nil {
		return err
	}
	connections, err := net.Listen("tcp", ":8082")
	if err != nil {
		return err
	}
	go echoDatagrams(datagrams)
	go echoConnections(connections)
	http.HandleFunc("/who", who)
	http.HandleFunc("/fetch", asked(fetch))
	http.HandleFunc("/udp", asked(askUDP))
	http.HandleFunc("/stream", asked(stream))
	return http.ListenAndServe(":8080", nil)
}

func echoDatagrams(conn net.PacketConn) {
	buffer := make([]byte, 1<<16)
	for {
		n, from, err := conn.ReadFrom(buffer)
		if err != nil {
			fatal(err)
		}
		_, _ = conn.WriteTo(buffer[:n], from) // who has not got it asks again
	}
}

func echoConnections(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			fatal(err)
		}
		go func() {
			defer conn.Close()
			_, _ = io.Copy(conn, conn) // the other side finds out
		}()
	}
}

// who says the pod's name, and the address that the client was seen with.
func who(w http.ResponseWriter, r *http.Request) {
	name, err := os.Hostname()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	host, _, _ := net.SplitHostPort(r.RemoteAddr)
	fmt.Fprintf(w, "%s %s", name, host)
}

// asked is a page that does something from within the pod: to=HOST:PORT says with
// whom, count=N how much.
func asked(do func(to string, count int) (string, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		count, err := strconv.Atoi(r.FormValue("count"))
		if err != nil && r.FormValue("count") != "" {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		said, err := do(r.FormValue("to"), count)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		fmt.Fprint(w, said)
	}
}

// fetch gets the page /who by a new connection.
func fetch(to string, _ int) (string, error) {
	client := http.Client{Timeout: timeout, Transport: &http.Transport{DisableKeepAlives: true}}
	answer, err := client.Get("http://" + to + "/who")
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	return string(text), err
}

// askUDP sends a datagram of count bytes, which must come back. The first of a size
// may only teach the sender the path's MTU.
func askUDP(to string, count int) (string, error) {
	conn, err := net.Dial("udp", to)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	question, answer := bytes.Repeat([]byte("w"), count), make([]byte, 1<<16)
	for range 3 {
		if _, err = conn.Write(question); err != nil {
			continue
		}
		if err := conn.SetReadDeadline(time.Now().Add(timeout / 3)); err != nil {
			return "", err
		}
		var n int
		if n, err = conn.Read(answer); err == nil && bytes.Equal(answer[:n], question) {
			return "ok", nil
		}
	}
	return "", errors.Join(err, errors.New("no answer that is right"))
}

// stream sends count small messages on one connection, each after the answer to the
// one before, and some milliseconds apart.
func stream(to string, count int) (string, error) {
	conn, err := net.DialTimeout("tcp", to, timeout)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	message := []byte("weft")
	for i := range count {
		if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
			return "", err
		}
		if _, err := conn.Write(message); err != nil {
			return "", fmt.Errorf("message %d: %w", i, err)
		}
		if _, err := io.ReadFull(conn, message); err != nil {
			return "", fmt.Errorf("answer %d: %w", i, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
	return "ok", nil
}

// fatal ends the program with a message.
func fatal(a ...any) {
	fmt.Fprintln(os.Stderr, a...)
	os.Exit(1)
}
