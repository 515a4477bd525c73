Console.Error.WriteLine("bench: no command given");
return 2;
