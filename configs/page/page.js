"use strict";
// The server sends the page's body anew once a second, and says when the run has ended: nothing is asked for after that.
const main = document.querySelector("main");
const events = new EventSource(location.pathname.replace(/\/$/, "") + "/live");
events.onmessage = (event) => {
  const news = JSON.parse(event.data);
  main.innerHTML = news.body;
  document.title = news.title;
  document.body.classList.remove("lost");
  if (news.ended) events.close();
};
// The process was killed, or cannot be reached: the browser goes on trying.
events.onerror = () => document.body.classList.add("lost");
